"""Trainers of many ranks, each with its own shards."""
