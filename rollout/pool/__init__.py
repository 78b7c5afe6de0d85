"""Many engines behind the surface of one: routing, weight updates for all of them, and replicas that come and go."""
