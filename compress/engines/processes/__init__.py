"""Runtimes in child processes, so that a crash of one ends nothing else."""
