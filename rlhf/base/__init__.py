"""Errors, files, JSON, text, intervals and processes, for all other rooms; imports none of them."""
