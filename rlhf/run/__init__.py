"""Services of a training run: metrics and tracker, checkpoints, progress, timing, memory, optimisers."""
