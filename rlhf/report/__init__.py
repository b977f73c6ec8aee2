"""HTML pages about runs, which open from disk without a network, and the W&B workspace."""
