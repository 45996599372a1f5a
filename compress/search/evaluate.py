"""Candidates made without training and measured: prune, shrink, refit, calibrate, export, time on the runtime.

Accuracy comes from images held out from the training images, which neither the refit nor the calibration has seen. What
a run reaches starts from there and trains on, so it is a lower bound as far as training does no harm. Latency comes from
the runtime itself, in a race with the dense model, because channel counts have steps that no count of operations shows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

from compress import pruning, quantization
from compress.data.batches import calibration_images, iter_batches, split_held_out
from compress.engines import Runtime
from compress.equality.outputs import torch_answer
from compress.errors import DataError, PruningError, RequestError
from compress.models import counting
from compress.pruning import Group
from compress.request import Request
from compress.search.candidate import Candidate
from compress.search.latency import Stopwatch
from compress.search.outcome import Outcome
from compress.stages import steps
from compress.workload import Workload

SCORED_IMAGES = 1000
"""At most this many training images are held out to score candidates, and at most a fifth of all."""
REFIT_IMAGES = 256
"""At most this many images refit a candidate and calibrate it; fewer when they are large, see `steps.MOST_PIXELS`."""

Hopeless = Callable[[float, int], str | None]
"""(latency in ms, bytes of the file) -> why the candidate is not worth scoring, or None."""


class OneShot:
    """Makes candidates without training and measures them; latency is cached by structure (channel counts and bits).

    Use it as a context manager, or call `close`.

    Args:
        base: what candidates differ from. Its runtime is the one that is timed; `auto` takes the one that runs the
            unpruned model fastest, quantized as the base says.
        workload: of `open_workload(base)`; only training images are looked at.
        folder: keeps `measured.json`, with which a later OneShot of the same request goes on; None keeps nothing.
        notify: called with each runtime that `auto` leaves out, and why.

    Raises:
        RequestError: the base's pruner shrinks nothing or trains, there are no images, or the plan is an NNI config list.
        RuntimeUnavailableError: the runtime does not run here.
        RunError: the folder holds measurements of another request, of another machine, or of a runtime that is gone.
    """

    def __init__(
        self,
        base: Request,
        workload: Workload,
        folder: Path | None = None,
        *,
        scored_images: int = SCORED_IMAGES,
        notify: Callable[[str], None] = lambda text: None,
    ) -> None:
        require_searchable(base)
        if not workload.dataset.has_images:
            raise RequestError("data", base.data, "images: candidates are compared on images held out from training")
        self.base, self.folder = base, folder
        count = min(scored_images, len(workload.dataset.train) // 5)
        if count == 0:
            raise DataError(
                f"{workload.dataset.source} has fewer than 5 training images, too few to hold one out: add some."
            )
        held_out, rest = split_held_out(workload.dataset.train, count, base.seed)
        self._workload = replace(workload, dataset=replace(workload.dataset, train=rest))
        self._held_out = held_out
        self._labels: list[torch.Tensor] | None = None
        if not workload.dataset.has_labels:
            answer = torch_answer(workload.model)
            predictions = workload.task.predictions
            self._labels = [torch.from_numpy(predictions(answer(x.numpy()))) for x, _ in self._scored()]
        most = max(1, steps.MOST_PIXELS // workload.preprocessing.input_size**2)
        self._calibration = calibration_images(
            self._workload.dataset, min(base.calibration_images, REFIT_IMAGES, most), workload.preprocessing, base.seed
        )
        self.groups = variable_groups(base, workload)
        self._stopwatch = Stopwatch(
            base,
            self._workload,
            folder,
            image=self._calibration[:1],
            quantize=self._quantized,
            score=self._score,
            images_scored=count,
            notify=notify,
        )
        self.dense, self.runtime = self._stopwatch.dense, self._stopwatch.runtime

    groups: tuple[Group, ...]
    """Of the plan, what can be varied: groups that the base request does not fix by name."""
    dense: Outcome
    """The model as it came: its latency is the fastest real fp32 on any runtime here."""
    runtime: Runtime
    """The one that candidates are timed on."""

    def __enter__(self) -> OneShot:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._stopwatch.close()

    def evaluate(self, candidate: Candidate, hopeless: Hopeless = lambda latency_ms, file_bytes: None) -> Outcome:
        """Makes the candidate and measures it; `hopeless` is asked before it is scored, the longer part.

        Raises:
            CompressError: it cannot be made: the plan, the quantizer or the runtime refuses it.
        """
        start = time.perf_counter()
        request = self._request(candidate)
        shrunk = self._shrunk(request)
        model = self._workload.model if shrunk is None else shrunk.model
        timed = self._stopwatch.time(request, shrunk.model if shrunk else None)
        why = hopeless(timed.latency_ms, timed.file_bytes)
        right = total = 0
        if why is None:
            if shrunk is not None:
                steps.refit(request, self._workload, self._workload.model, model, shrunk.kept_channels)
            deployed = quantization.fake_quantized(self._quantized(request, model)) if request.quantizes else model
            right, total = self._score(deployed)
        return Outcome(
            accuracy=right / total if total else 0.0,
            parameters=counting.count_parameters(model),
            macs=counting.count_macs(model, self._workload.preprocessing.input_size),
            seconds=time.perf_counter() - start,
            n_images=total,
            stopped=why,
            **asdict(timed),
        )

    def sensitive_layers(self, wide_bits: str) -> tuple[str, ...]:
        """Quantized layers, the one that puts most noise on the logits by itself first (see `quantization.mixed`).

        Those that have `wide_bits` (such as `8/8`) already are left out.
        """
        quantized = self._quantized(self.base, self._workload.model)
        decibels = quantization.layer_sensitivity(quantized, self._calibration[: steps.SENSITIVITY_IMAGES])
        bits = steps.prepared_with_bits(self.base, self._workload.model, self._calibration)[1].layers
        return tuple(layer for layer in decibels if str(bits[layer]) != wide_bits)

    # ---- the steps -------------------------------------------------------------------------------------------------

    def _request(self, candidate: Candidate) -> Request:
        request = candidate.request(self.base)
        count = min(request.reconstruction_images, REFIT_IMAGES)
        return request.model_copy(update={"reconstruction_images": count, "max_quantization_loss": None})

    def _shrunk(self, request: Request) -> pruning.PrunedModel | None:
        """None where nothing goes: no ratio is large enough for one multiple of channels."""
        if not request.prunes:
            return None
        try:
            plan = steps.usable_plan(request, self._workload)
        except PruningError:
            if any(_removes(request, group) for group in self.groups):
                raise
            return None
        shrunk = steps.shrink(request, self._workload, self._workload.model, plan, lambda done, text: None)
        shrunk.model.eval()
        return shrunk

    def _quantized(self, request: Request, model: nn.Module) -> quantization.Quantized:
        prepared, plan = steps.prepared_with_bits(request, model, self._calibration)
        return steps.quantize(request, prepared, plan, self._calibration)

    def _score(self, model: nn.Module) -> tuple[int, int]:
        answer, right = torch_answer(model), 0
        for number, (x, labels) in enumerate(self._scored()):
            targets = labels if self._labels is None else self._labels[number]
            right += int(self._workload.task.correct(answer(x.numpy()), targets.numpy()).sum())
        return right, len(self._held_out)

    def _scored(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of images and labels, read anew each time: 1,000 images of 1024 pixels are 12 GB."""
        preprocessing = self._workload.preprocessing
        return iter_batches(self._held_out, steps.TEST_BATCH, shuffle=False, seed=0, preprocessing=preprocessing)


def require_searchable(base: Request) -> None:
    """Raises `RequestError` where per-group ratios cannot be set, or making a candidate would need training."""
    if base.config_list is not None:
        raise RequestError("config_list", "a list", "nothing, because a search sets the ratio of each group itself")
    if not base.shrinks or pruning.PRUNERS[base.pruner].trains:
        known = ", ".join(
            name for name, one in pruning.PRUNERS.items() if not one.trains and not one.fine_grained
        )
        raise RequestError("pruner", base.pruner, f"one that shrinks layers and needs no training of its own: {known}")


def variable_groups(base: Request, workload: Workload) -> tuple[Group, ...]:
    """Groups whose ratio may be chosen: those that can lose a multiple of channels and that `base` does not fix by name."""
    plan = steps.usable_plan(
        base.model_copy(update={"sparsity": 0.5, "ranking": "per-group", "max_layer_sparsity": None}), workload
    )
    fixed = tuple(base.layer_sparsity)
    named = [
        g for g in plan.groups if any(layer == n or layer.startswith(f"{n}.") for layer in g.layers for n in fixed)
    ]
    free = tuple(group for group in plan.groups if group not in named)
    if not free:
        raise RequestError(
            "layer_sparsity", base.layer_sparsity, "at least one group of layers left to choose a ratio for"
        )
    return free


def _removes(request: Request, group: Group) -> bool:
    """Whether the ratio asked of a group is worth at least one step of its channels."""
    step = math.lcm(request.channel_multiple, group.unit * group.blocks)
    return request.layer_sparsity.get(group.layers[0], request.sparsity) * group.channels_before >= step
