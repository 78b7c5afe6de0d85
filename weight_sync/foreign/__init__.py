"""What trainers of other makes send: payloads that were meant to be unpickled, read here without executing anything."""
