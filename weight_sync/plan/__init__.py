"""From which bytes to which part of which parameter: compiled once, replayed by every commit."""
