"""Fine-tuning by several processes of this machine, one for each GPU: torch's DistributedDataParallel.

Every process takes its part of each batch, and the gradients are averaged before each step (Li et al. 2020, "PyTorch
Distributed: experiences on accelerating data parallel training"). So a step is the one that a single process takes on the
whole batch, except that a BatchNorm sees its process's part; the first process's running statistics are kept.

The processes meet through a file and talk through loopback (gloo on CPUs, NCCL on GPUs): nothing listens on another address.
Each ends when the one that started it does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

from compress import memory, models, training
from compress.errors import CompressError, RequestError, TrainingError
from compress.files import INSTALLATION
from compress.request import Request
from compress.stages import steps
from compress.workload import open_workload

ORDER, RESULT, WEIGHTS, PROGRESS, STORE = (
    "request.json",
    "result.json",
    "weights.safetensors",
    "progress.jsonl",
    "store",
)
REFUSED, NO_MEMORY = 3, 4
"""Exit codes of a process: it leaves a sentence, or memory ran out."""
POLL_S = 0.2
GRACE_S = 5.0


def require_devices(processes: int) -> None:
    """Raises `RequestError` when this machine has GPUs, and fewer than that."""
    present = torch.cuda.device_count()
    if 0 < present < processes:
        raise RequestError("training_processes", processes, f"at most {present}, the number of GPUs of this machine")


def fine_tune(
    request: Request, run_folder: Path, model: nn.Module, progress: training.Progress
) -> list[dict[str, Any]]:
    """`steps.train` after pruning, by `request.training_processes`: from what the run's folder holds into `model`.

    Returns one record per epoch, as `training.fit`.

    Raises:
        TrainingError: the loss is not finite, or a process ended without a result.
        MemoryError: it ran out in one of them.
    """
    with tempfile.TemporaryDirectory(prefix="espalier-") as folder:
        meeting = Path(folder)
        (meeting / ORDER).write_text(request.to_json(), encoding="utf-8")
        with _processes(request.training_processes, run_folder, meeting) as started:
            _wait(started, meeting, progress)
        model.load_state_dict(load_file(meeting / WEIGHTS))
        curve: list[dict[str, Any]] = json.loads((meeting / RESULT).read_text(encoding="utf-8"))
        return curve


@contextmanager
def _processes(count: int, run_folder: Path, meeting: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    threads = max(1, torch.get_num_threads() // count)
    local = {
        "PYTHONPATH": str(INSTALLATION),
        "OMP_NUM_THREADS": str(threads),
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # that no parameter was unused, which is not known before
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
    }
    command = [
        sys.executable,
        "-P",
        "-m",
        "compress.stages.data_parallel",
        str(run_folder.resolve()),
        str(meeting),
        str(count),
    ]
    started: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(count):
            started.append(
                subprocess.Popen([*command, str(rank)], stdin=subprocess.PIPE, env={**os.environ, **local})  # noqa: S603
            )
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def _wait(started: Sequence[subprocess.Popen[bytes]], meeting: Path, progress: training.Progress) -> None:
    """Until all have ended, or one has failed."""
    told = 0
    while True:
        codes = [process.poll() for process in started]
        if any(codes):
            raise _failure(started, meeting)
        told = _pass_on(meeting / PROGRESS, told, progress)
        if None not in codes:
            return
        time.sleep(POLL_S)


def _failure(started: Sequence[subprocess.Popen[bytes]], meeting: Path) -> Exception:
    """Of the process that knows why: the others ended because their partner was gone, or still wait for it."""
    deadline = time.monotonic() + GRACE_S
    while None in (codes := [process.poll() for process in started]) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    if reasons := sorted(meeting.glob("refused-*")):
        return TrainingError(reasons[0].read_text(encoding="utf-8"))
    if NO_MEMORY in codes:
        return MemoryError("a training process ran out of memory")
    code = min(code for code in codes if code)  # of one that was killed, where there is one
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return TrainingError(
        f"One of the training processes ended without a result ({how}); the log shows more. Resume the run, or start one with "
        "--training-processes 1."
    )


def _pass_on(path: Path, told: int, progress: training.Progress) -> int:
    """Tells the latest of the steps that are written down, and returns how many bytes were read so far."""
    if not path.exists():
        return told
    with path.open("rb") as file:
        file.seek(told)
        lines = file.read().rpartition(b"\n")[0]
    if not lines:
        return told
    progress(*json.loads(lines.splitlines()[-1]))
    return told + len(lines) + 1


# ---- one of the processes -----------------------------------------------------------------------------------------


def _train(run_folder: Path, meeting: Path, count: int, rank: int) -> None:
    request = Request.from_file(meeting / ORDER)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(rank)  # not run here: the machines this was made on have no GPU
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", init_method=f"file://{meeting / STORE}", rank=rank, world_size=count
    )
    workload = open_workload(request, kept=run_folder / "uploads")
    model = models.rebuild(run_folder / "stages" / "shrunk")
    config = steps.training_config(request, workload, request.finetune_epochs, request.learning_rate)
    teacher = models.rebuild(run_folder / "stages" / "baseline") if config.distillation_weight > 0 else None
    progress, part = _writer(meeting / PROGRESS, rank), slice(rank, None, count)
    curve = steps.train(request, workload, model, config, teacher=teacher, progress=progress, part=part)
    if rank == 0:
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, meeting / WEIGHTS)
        (meeting / RESULT).write_text(json.dumps(curve), encoding="utf-8")
    dist.destroy_process_group()


def _writer(path: Path, rank: int) -> training.Progress:
    def write(fraction: float, text: str) -> None:
        if rank == 0:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([fraction, text]) + "\n")

    return write


def _end_with_parent() -> None:
    """Standard input is closed when the process that holds its other end is gone, however it went."""
    os.read(
        sys.stdin.fileno(), 1
    )  # nothing is ever written; a buffered read would hold a lock that the interpreter's end wants
    os._exit(1)


def main() -> None:
    run_folder, meeting, count, rank = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        _train(run_folder, meeting, count, rank)
    except CompressError as error:
        (meeting / f"refused-{rank}").write_text(str(error), encoding="utf-8")
        os._exit(REFUSED)  # without waiting for partners in the middle of a step
    except (MemoryError, RuntimeError) as error:
        if memory.ran_out(error):
            os._exit(NO_MEMORY)
        raise


if __name__ == "__main__":
    main()
