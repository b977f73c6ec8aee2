"""Artefacts leave and enter the registry: export, push and pull, model cards, reproduction."""
