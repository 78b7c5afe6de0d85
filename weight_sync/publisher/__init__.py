"""The trainer's half of an update."""
