"""Several receivers that answer as one: the ranks of an engine, the replicas of a pool, the engines of one trainer."""
