"""Espalier with its defaults but for what the row asks."""

import shutil

from handover import Job

import compress

job = Job.read()
epochs = job.budget / job.train_images
job.spend(job.budget)
options = {"finetune_epochs": epochs * 5 / 6, "qat_epochs": epochs / 6} | job.options
compress.run(
    compress.Request(
        model=job.model,
        checkpoint=str(job.weights),
        data=job.data if job.budget else "none",
        input_size=job.input_size,
        mean=(job.mean,) * 3,
        std=(job.std,) * 3,
        seed=job.seed,
        **options,
    ),
    out=job.folder / "run",
)
name = "pruned" if options.get("quantizer") == "none" else "quantized.onnxruntime"
shutil.copy(job.folder / "run" / "artifacts" / f"{name}.onnx", job.folder / "model.onnx")
