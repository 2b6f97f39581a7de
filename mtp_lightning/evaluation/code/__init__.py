"""Programs that a model writes: sampled, run in a sandbox, and counted as pass@k."""
