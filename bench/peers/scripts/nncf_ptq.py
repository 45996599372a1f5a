"""NNCF's post-training quantization: of the OpenVINO model for OpenVINO, of the ONNX model for ONNX Runtime."""

import nncf
import onnx
import openvino
from exporting import export
from handover import Job
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix

job = Job.read()
if "ratio" in job.options:
    from pruning import prune_and_tune

    model = prune_and_tune(job)
else:
    model = job.dense()
export(model, job.example, job.folder / "float.onnx")
images = list(job.calibration().split(1))
overflow = AdvancedQuantizationParameters(overflow_fix=None if job.int8_dot_product else OverflowFix.ENABLE)
quantized = nncf.quantize(
    openvino.convert_model(job.folder / "float.onnx"),
    nncf.Dataset(images, lambda image: image.numpy()),
    subset_size=len(images),
    advanced_parameters=overflow,
)
openvino.save_model(quantized, job.folder / "model.xml", compress_to_fp16=False)
quantized = nncf.quantize(
    onnx.load(job.folder / "float.onnx"),
    nncf.Dataset(images, lambda image: {"images": image.numpy()}),
    subset_size=len(images),
    advanced_parameters=overflow,
)
onnx.save(quantized, job.folder / "model.onnx")
