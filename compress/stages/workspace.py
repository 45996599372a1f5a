"""What stages share: models in the run's folder, saved by one and rebuilt by a later one, and the images that forms are
compared on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from torch import Tensor, nn

from compress import equality, models, quantization
from compress.data.batches import calibration_images
from compress.engines import Session
from compress.equality.outputs import of_batches, torch_answer
from compress.models import counting
from compress.report import Handoff
from compress.runs import Run
from compress.stages import ledger
from compress.stages.results import (
    BASELINE,
    Answers,
    BaselineResult,
    FinetuneResult,
    LayerSize,
    QuantizeResult,
    Variant,
)
from compress.workload import Workload

REBUILT_IMAGES = 16
COMPARED_IMAGES = 256
SMALL = 96
"""Pixels of a side up to which this many are compared; of larger images a quarter, as the comparison must not take longer
than what it checks."""

Reference = Callable[[Variant, quantization.Flavour], np.ndarray]
"""The torch model's outputs [images, ...] that a variant's file of a flavour has to give."""



def save_model(run: Run, workload: Workload, model: nn.Module, folder: str) -> tuple[str, ...]:
    """Saves weights and structure; returns the files, relative to the run's folder."""
    models.save(
        model,
        run.folder / folder,
        architecture=workload.architecture,
        preprocessing=workload.preprocessing,
        class_names=workload.class_names,
    )
    return f"{folder}/model.safetensors", f"{folder}/model.json"


def load_model(run: Run, workload: Workload, folder: str) -> nn.Module:
    """The model that `save_model` saved, in eval mode."""
    template = None if workload.architecture else workload.model
    return models.rebuild(run.folder / folder, model=template)


def load_quantized(run: Run, workload: Workload) -> quantization.Quantized:
    """What the quantize stage left, on the graph that the float model is prepared to again."""
    images = calibration_images(workload.dataset, 2, workload.preprocessing, run.request.seed)
    model = load_model(run, workload, FinetuneResult.FOLDER)
    return quantization.restore(model, run.folder / QuantizeResult.FOLDER, images)


def prove_rebuilt(
    run: Run, workload: Workload, before: Answers, model: nn.Module, *, quantized: bool = False
) -> Handoff:
    """The hand-off from a model to the same one rebuilt from its files, on the first test images.

    Args:
        before: of the model, as the stage that saved it recorded them.
        quantized: compare by `equality.QUANTIZED_RULE`.

    Raises:
        HandoffError: they answer differently.
    """
    images = next(ledger.test_batches(workload, REBUILT_IMAGES))[0]
    expected = np.load(run.folder / before.answers)[: len(images)]
    got = torch_answer(model)(images.numpy())
    names = f"{before.name}, torch", f"{before.name}, saved and rebuilt"
    if quantized:
        return equality.checked(equality.judge_grids(*names, expected, got, workload.task))
    return equality.same_function(*names, expected, got)


def layer_sizes(workload: Workload, model: nn.Module) -> tuple[int, int, tuple[LayerSize, ...]]:
    """Parameters, multiply-accumulates of one image, and both layer by layer."""
    size = workload.preprocessing.input_size
    layers = tuple(
        LayerSize(name=layer.name, type=layer.type, channels=layer.channels, macs=layer.macs)
        for layer in counting.layer_shapes(model, size)
    )
    return counting.count_parameters(model), counting.count_macs(model, size), layers


# ---- what files and engines are compared on --------------------------------------------------------------------------


def compared_images(workload: Workload) -> list[Tensor]:
    """The first test images, in batches of float32 [N, 3, H, W], normalised."""
    enough = COMPARED_IMAGES if workload.preprocessing.input_size <= SMALL else COMPARED_IMAGES // 4
    batches: list[Tensor] = []
    for images, _ in ledger.test_batches(workload, 32):
        batches.append(images)
        if sum(map(len, batches)) >= enough:
            break
    return batches


def folder_of(variant: Variant) -> str:
    """The folder of a float variant's weights."""
    return BaselineResult.FOLDER if variant.name == BASELINE else FinetuneResult.FOLDER


def references(
    run: Run, workload: Workload, quantized: quantization.Quantized | None, images: Sequence[Tensor]
) -> Reference:
    """Computes each reference once."""

    @cache
    def of(name: str, flavour: quantization.Flavour | None) -> np.ndarray:
        if flavour is None:
            model = load_model(run, workload, name)
        else:
            assert quantized is not None, "a quantized variant comes with a quantized model"
            model = quantization.fake_quantized(quantized, flavour)
        return of_batches(torch_answer(model), images)

    def reference(variant: Variant, flavour: quantization.Flavour) -> np.ndarray:
        return of("", flavour) if variant.precision == "int8" else of(folder_of(variant), None)

    return reference


def padded(session: Session, batch_size: int, images: np.ndarray) -> np.ndarray:
    """A static session takes full batches only: the last one is filled up and the surplus outputs dropped.

    Args:
        images: float32 [N, 3, H, W] with N up to `batch_size`.

    Returns:
        Outputs [N, ...].
    """
    missing = batch_size - len(images)
    if missing:
        images = np.concatenate([images, np.zeros((missing, *images.shape[1:]), np.float32)])
    outputs: np.ndarray = session.run(images)[: batch_size - missing]
    return outputs
