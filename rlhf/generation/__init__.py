"""Talking to a model, any artefact, hub name or folder: `rlhf generate` for prompts, `rlhf chat` for conversations."""
