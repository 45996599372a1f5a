"""ONNX Runtime's static quantization, with its defaults or as its documentation advises for the CPU at hand."""

from exporting import export
from handover import Job
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process


class Reader(CalibrationDataReader):
    def __init__(self, images):
        self.batches = iter(images.split(32))

    def get_next(self):
        batch = next(self.batches, None)
        return None if batch is None else {"images": batch.numpy()}


job = Job.read()
if "ratio" in job.options:
    from pruning import prune_and_tune

    model = prune_and_tune(job)
else:
    model = job.dense()
export(model, job.example, job.folder / "float.onnx")
quant_pre_process(str(job.folder / "float.onnx"), str(job.folder / "prepared.onnx"))
advised = {
    "activation_type": QuantType.QUInt8,
    "weight_type": QuantType.QInt8,
    "per_channel": True,
    "reduce_range": not job.int8_dot_product,
}
quantize_static(
    str(job.folder / "prepared.onnx"),
    str(job.folder / "model.onnx"),
    Reader(job.calibration()),
    **({} if job.options.get("defaults") else advised),
)
