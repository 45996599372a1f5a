"""Benchmarks as commands; `make bench` runs them. They take minutes to hours, and nothing else should run meanwhile."""
