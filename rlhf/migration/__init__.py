"""Configs of other projects as ours."""
