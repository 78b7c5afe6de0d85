"""A small reference GRPO loop: read `loop.py` first, it shows how a trainer drives the engine."""
