"""The audit: a sample of a running stage is written down, and recomputed by a plain implementation of its own.

`record` and `sheet` write; `plain_*` recompute and share no code with the stages (`tests/doctor/audit/test_plain.py` reads their
imports); `compare` makes statements of what was recorded and what was expected.
"""
