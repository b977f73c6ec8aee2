"""What is wrong with a run, said before it starts, while it runs, and from its logs."""
