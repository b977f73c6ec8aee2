"""Evaluation of policies on held-out prompts, and the report card of reward models."""
