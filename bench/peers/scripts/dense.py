"""The dense model as it is: what everything is compared with."""

from exporting import export
from handover import Job

job = Job.read()
export(job.dense(), job.example, job.folder / "model.onnx")
