"""What users measure: the machine's own limits, and the engine next to them. Run by `rollout bench`."""
