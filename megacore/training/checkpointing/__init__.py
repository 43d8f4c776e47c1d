"""Training checkpoints and the final model: what a run writes, and what it resumes from."""
