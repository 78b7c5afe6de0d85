"""The demo: a small model learns to sort digits, its rollouts come from an engine that it pushes weights into."""
