"""What a client may ask of an engine, what it answers, and what ranks tell each other, as typed messages."""
