"""Checkpoints of strangers: inspected without being loaded, read in a confined process, and taken as tensors only."""
