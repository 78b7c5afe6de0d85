"""The engine: its loop, its commands, where it runs, and the surface that callers use."""
