"""Reward models: the ranking loss and its trainer, scoring, and all sources of reward."""
