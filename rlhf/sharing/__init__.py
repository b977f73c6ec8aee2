"""Verbs of the registry: export, push and pull, model cards, reproduction."""
