"""Shared by all tests: two threads at most, and no test may leave torch's global state changed."""

import torch

torch.set_num_threads(min(2, torch.get_num_threads()))
