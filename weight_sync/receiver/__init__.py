"""The engine's half of an update."""
