"""Rollout engine."""
