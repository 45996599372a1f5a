"""Memory that runs out: training once more with half the batch, everything else one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from compress import memory, runs
from compress.errors import RunError, TrainingError
from compress.request import Request

CPU = (
    "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 99"
)


class Training:
    """Spoils the weights, then runs out of memory with more than `fits` images per step."""

    def __init__(self, fits: int, error: Exception) -> None:
        self.model, self.fits, self.error = nn.Linear(3, 2), fits, error
        self.before = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.tried: list[int] = []
        self.told: list[str] = []

    def __call__(self, batch_size: int) -> str:
        assert all(torch.equal(self.before[name], value) for name, value in self.model.state_dict().items())
        self.tried.append(batch_size)
        nn.init.ones_(self.model.weight)
        if batch_size > self.fits:
            raise self.error
        return "a curve"

    def carry_out(self, batch_size: int) -> tuple[str, int]:
        return memory.halving_once(self.model, self, batch_size, self.told.append)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), RuntimeError(CPU), MemoryError()]
)
def test_training_begins_again_with_half_the_batch_once(error: Exception) -> None:
    training = Training(32, error)
    assert training.carry_out(64) == ("a curve", 32)
    assert training.tried == [64, 32]
    assert training.told == ["memory ran out with 64 images per step: again with 32"]
    assert memory.note(64, 32) == "Memory ran out with 64 training images per step, so training began again with 32."
    assert memory.note(64, 64) is None


def test_the_second_time_is_one_sentence() -> None:
    training = Training(0, RuntimeError(CPU))
    with pytest.raises(TrainingError, match="with 64 images per step, and again with 32. Start a run with a lower"):
        training.carry_out(64)
    assert training.tried == [64, 32]
    with pytest.raises(TrainingError, match="with 3 images per step, the fewest there can be"):
        Training(0, MemoryError()).carry_out(3)


def test_other_errors_are_not_taken_for_it() -> None:
    for error in (RuntimeError("shape mismatch"), ValueError("can't allocate memory")):
        training = Training(0, error)
        with pytest.raises(type(error)):
            training.carry_out(64)
        assert training.tried == [64]


def test_a_real_allocation_that_fails_is_recognised() -> None:
    with pytest.raises(RuntimeError) as failed:
        torch.empty(1 << 62, dtype=torch.uint8)
    assert memory.ran_out(failed.value)


def test_a_stage_that_runs_out_of_memory_is_one_sentence(tmp_path: Path) -> None:
    run = runs.open_run(tmp_path / "run", Request(), lambda event: None)

    def export(run: runs.Run) -> runs.StageResult:
        torch.empty(1 << 62, dtype=torch.uint8)
        return runs.StageResult()

    with pytest.raises(RunError, match="Memory ran out in the stage export. End other programs"):
        run.stage(export)
    assert not (tmp_path / "run" / "stages" / "export.json").exists()
