"""A run while it lasts: tracker, checkpoints, progress, timing, memory, optimisers."""
