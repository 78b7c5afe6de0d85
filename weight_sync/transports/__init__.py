"""Ways for the bytes of an update to reach an engine; what is said about them is the same for all."""
