"""ModelOpt's INT8 quantization, calibrated and then trained."""

import modelopt.torch.quantization as mtq
from exporting import export
from handover import Job
from training import train

job = Job.read()
images = job.calibration()


def calibrate(model):
    for part in images.split(32):
        model(part)


quantized = mtq.quantize(job.dense(), mtq.INT8_DEFAULT_CFG, calibrate)
train(quantized, job.dense(), job.training(), 0.00003)
export(quantized, job.example, job.folder / "model.onnx", dynamo=False)
