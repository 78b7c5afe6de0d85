"""The engine's ends of the transports: arenas that it has opened, and where a session's bytes wait for its commit."""
