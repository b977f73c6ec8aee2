"""Known faults, held-out faults and clean runs, by which a doctor of training runs is judged. README.md says how."""
