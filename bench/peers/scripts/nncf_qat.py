"""NNCF's quantization-aware training in torch, with or without Torch-Pruning before it."""

import nncf
import openvino
import torch
from exporting import export
from handover import Job
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix
from training import train

job = Job.read()
if "ratio" in job.options:
    from pruning import prune_and_tune

    model, rest = prune_and_tune(job, share=5 / 6), 1 / 6
else:
    model, rest = job.dense(), 1.0
images = list(job.calibration().split(1))
quantized = nncf.quantize(
    model,
    nncf.Dataset(images),
    subset_size=len(images),
    advanced_parameters=AdvancedQuantizationParameters(
        overflow_fix=None if job.int8_dot_product else OverflowFix.ENABLE
    ),
)
train(quantized, job.dense(), job.training(rest), 0.00003)
with torch.no_grad():
    size = job.input_size
    deployed = openvino.convert_model(quantized, example_input=job.example, input=[-1, 3, size, size])
    openvino.save_model(deployed, job.folder / "model.xml", compress_to_fp16=False)
    export(nncf.strip(quantized, example_input=job.example), job.example, job.folder / "model.onnx", dynamo=False)
