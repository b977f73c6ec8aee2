"""The reward model: K-wise ranking loss, its trainer, and what the trained model is worth."""
