"""Memory, time and disk of stages, estimated before they run."""
