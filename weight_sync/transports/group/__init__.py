"""Bytes that arrive over a process group, and where they wait."""
