"""Health checks: what a stage's log says of its run."""
