"""Torch-Pruning's quick start: group magnitude, channels in multiples of 8, the classifier's outputs kept; then training."""

import torch_pruning as tp
from training import train


def prune_and_tune(job, share=1.0):
    model = job.dense()
    classifier = [layer for layer in model.modules() if getattr(layer, "out_features", None) == 10]
    pruner = tp.pruner.BasePruner(
        model,
        job.example,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=job.options["ratio"],
        global_pruning=job.options.get("isomorphic", False),
        isomorphic=job.options.get("isomorphic", False),
        ignored_layers=classifier,
        round_to=8,
    )
    pruner.step()
    rate = {"adamw": 0.001, "sgd": 0.04}[job.options.get("optimizer", "adamw")]
    return train(model, job.dense(), job.training(share), rate, job.options.get("optimizer", "adamw"))
