"""Logs of other projects' runs, mapped onto the figures of this one and read by the same health checks."""
