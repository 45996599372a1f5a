"""ModelOpt's FastNAS: searches the sub-network within a share of the FLOPs, which is then trained."""

import modelopt.torch.opt as mto
import modelopt.torch.prune as mtp
import torch
from exporting import export
from handover import Job
from training import train

job = Job.read()
images, labels = job.labelled(1000)


def score(model):
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())


structure = job.folder.parent / "structure.pth"
if job.budget:
    structure = job.folder / "structure.pth"
    model, _ = mtp.prune(
        job.dense(),
        mode="fastnas",
        constraints={"flops": job.options["flops"]},
        dummy_input=job.example,
        config={
            "data_loader": [(part,) for part in job.calibration().split(32)],
            "collect_func": lambda batch: batch[0],
            "score_func": score,
            "checkpoint": str(job.folder / "fastnas.pth"),
        },
    )
    mto.save(model, structure)
else:  # the search looks at images, and would find another structure at another size
    model = mto.restore(job.dense(), structure)
train(model, job.dense(), job.training(), 0.001)
export(model, job.example, job.folder / "model.onnx")
