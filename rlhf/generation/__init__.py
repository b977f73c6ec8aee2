"""Answers of any model, an artefact, hub name or folder: `rlhf generate` for prompts, `rlhf chat` for conversations."""
