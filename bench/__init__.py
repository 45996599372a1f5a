"""Benchmarks as commands; `make bench` runs them. They take minutes to hours, and nothing else should run meanwhile."""

import torch

from compress import machine


def made_on() -> str:
    """The machine and the versions that a table's figures depend on, as the end of a sentence."""
    where = machine.describe(torch.get_num_threads())
    return f"{where.cpu}, {where.threads} thread(s), torch {where.versions['torch']}, NNI {where.versions['nni']}"
