"""The report card of a reward model."""
