"""Health checks: causes and evidence read from a stage's log."""
