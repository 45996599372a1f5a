"""Neural Compressor's static quantization of an exported program (PT2E), its route for CPUs."""

import torch
from exporting import export as to_onnx
from handover import Job
from neural_compressor.torch.export import export
from neural_compressor.torch.quantization import convert, get_default_static_config, prepare

job = Job.read()
images = job.calibration()
batch = torch.export.Dim("batch", min=1, max=4096)
program = export(job.dense(), example_inputs=(images[:2],), dynamic_shapes=({0: batch},))
prepared = prepare(program, get_default_static_config())
for part in images.split(32):
    prepared(part)
to_onnx(convert(prepared), job.example, job.folder / "model.onnx")
