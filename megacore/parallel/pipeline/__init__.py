"""Pipeline parallelism: stages, schedules, and the forward-only pass."""
