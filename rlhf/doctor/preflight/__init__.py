"""Preflight: what has to be true before a long run."""
