"""Layers of the decoder; each is given its tensor-parallel group and knows which part of the checkpoint it holds."""
