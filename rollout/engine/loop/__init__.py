"""The engine loop and its bookkeeping: what happens on one rank between two steps."""
