"""Checks of a run before it starts, while it trains, and from its logs."""
