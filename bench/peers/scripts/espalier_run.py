"""Espalier with its defaults but for what the row asks."""

import shutil

from handover import Job

import compress

job = Job.read()
epochs = job.budget / job.train_images
tune, qat = job.options.pop("tune"), job.options.pop("qat")
job.spend(round(job.budget * (tune + qat)))
compress.run(
    compress.Request(
        model=job.model,
        checkpoint=str(job.weights),
        data=job.data if job.budget else "none",
        input_size=job.input_size,
        mean=(job.mean,) * 3,
        std=(job.std,) * 3,
        seed=job.seed,
        finetune_epochs=epochs * tune,
        qat_epochs=epochs * qat,
        **job.options,
    ),
    out=job.folder / "run",
)
name = "pruned" if job.options.get("quantizer") == "none" else "quantized.onnxruntime"
shutil.copy(job.folder / "run" / "artifacts" / f"{name}.onnx", job.folder / "model.onnx")
