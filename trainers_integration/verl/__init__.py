"""verl's rollouts by this engine: `actor_rollout_ref.rollout.name=rollout_sync` is all that a configuration needs."""
