"""Torch-Pruning and training; no quantization."""

from exporting import export
from handover import Job
from pruning import prune_and_tune

job = Job.read()
export(prune_and_tune(job), job.example, job.folder / "model.onnx")
