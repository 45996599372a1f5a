"""Which torchvision classifiers can be pruned and quantized, proved for each: `docs/coverage.md` and `.json`.

    python -m bench.coverage [MODELS...] [--out docs] [--again]

Each row is made in a process of its own: 50 % pruned and proved equal to the masked model, saved, rebuilt in a process
in which nni cannot be imported, exported to ONNX and run by ONNX Runtime. Another process quantizes what pruning left
(bench/coverage_quantized.py). What is there already and was made with the same versions is kept unless `--again` is
given. Weights are random, so that nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.models.vision_transformer import VisionTransformer

from bench import coverage_table
from bench.randomised import randomise
from compress import machine, models, onnx_export, pruning
from compress.engines import RUNTIMES, BuildSpec
from compress.equality import outputs
from compress.files import write_text
from compress.models import architectures
from compress.preprocessing import Preprocessing
from compress.tasks import CLASSIFICATION

Row = dict[str, Any]

SPARSITY, CLASSES, SEED = 0.5, 10, 0
AUXILIARY = "+aux"
WITH_AUXILIARY = ("googlenet", "inception_v3")
SIZES = {"inception_v3": 96, "inception_v3+aux": 299, "maxvit_t": 224, "vit_h_14": 56}
"""Images in pixels where 64 are too few or do not fit the patches."""
LIMIT_S = 1800


def _one_block_per_stage() -> nn.Module:
    """regnet_y_128gf (Goyal et al., arXiv:2202.08360) with its widths and groups, one block in each stage."""
    full = BlockParams.from_init_params(depth=27, w_0=456, w_a=160.83, w_m=2.52, group_width=264, se_ratio=0.25)
    shallow = BlockParams(
        [1] * len(full.depths), full.widths, full.group_widths, full.bottleneck_multipliers, full.strides, full.se_ratio
    )
    return RegNet(shallow, num_classes=CLASSES)


REDUCED = {
    "vit_h_14": ("2 of 32 blocks", lambda: VisionTransformer(56, 14, 2, 16, 1280, 5120, num_classes=CLASSES)),
    "regnet_y_128gf": ("1 block per stage", _one_block_per_stage),
}
"""Too large for the memory of a small machine in full: what is built of them instead, with their own widths."""


@dataclass(frozen=True)
class Subject:
    """A classifier as this table tests it; `architecture` is None for one at reduced depth."""

    name: str
    architecture: models.Architecture | None
    input_size: int

    def build(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            model = models.build(self.architecture) if self.architecture else REDUCED[self.name][1]()
        return randomise(model)

    def images(self) -> Tensor:
        """[2, 3, size, size], the same in every process."""
        shape = (2, 3, self.input_size, self.input_size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(SEED))


def names() -> tuple[str, ...]:
    """Every row of the table, in order."""
    with_auxiliary = [name + AUXILIARY for name in WITH_AUXILIARY]
    return tuple(sorted([*architectures.names(), *with_auxiliary]))


def subject(name: str) -> Subject:
    plain = name.removesuffix(AUXILIARY)
    size = SIZES.get(name, SIZES.get(plain, 64))
    if plain in REDUCED:
        return Subject(plain, None, size)
    architecture = models.fresh(plain, CLASSES, size)
    if name != plain:
        kwargs = architecture.kwargs | {"aux_logits": True, "init_weights": False}
        architecture = models.Architecture(plain, CLASSES, kwargs)
    return Subject(name, architecture, size)


# ---- one row ------------------------------------------------------------------------------------------------------


def measure(name: str, folder: Path) -> Row:
    """One row, in this process; the model is left in `folder`.

    Raises:
        CompressError: the model cannot be pruned, is not equal to the masked one, or cannot be exported.
    """
    tested = subject(name)
    model, images = tested.build(), tested.images()
    started = time.perf_counter()
    plan = pruning.plan(model, images, sparsity=SPARSITY)
    shrunk = pruning.prune(model, images, plan, "l1-norm")
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    preprocessing = Preprocessing(tested.input_size, (0.5,) * 3, (0.5,) * 3)
    small = shrunk.model.eval()
    models.save(small, folder, architecture=tested.architecture, preprocessing=preprocessing, class_names=())
    expected = outputs.torch_answer(small)(images.numpy())
    return {
        "model": name,
        "reduced": REDUCED[name][0] if name in REDUCED else None,
        "input_size": tested.input_size,
        "relative_difference": shrunk.max_abs_diff / shrunk.reference_scale,
        "parameters": models.count_parameters(model),
        "parameters_kept": models.count_parameters(small) / models.count_parameters(model),
        "macs_kept": models.count_macs(small, tested.input_size) / models.count_macs(model, tested.input_size),
        "reload_difference": float(np.abs(expected - _answers_without_nni(name, folder)).max()),
        "onnx_relative_difference": _onnx_difference(small, tested, folder, expected),
        "seconds": seconds,
        "peak_bytes": peak,
        "layers": len(plan.layers) + len(plan.unpruned),
        "left_out": [[left.layer, left.reason] for left in plan.unpruned],
    }


def answer(name: str, folder: Path, threads: int) -> None:
    """Rebuild the model in `folder` and write its answers there; the process that does this cannot import nni.

    Another number of threads adds up in another order, and the answers would not be equal bit for bit.
    """
    torch.set_num_threads(threads)
    tested = subject(name)
    template = None if tested.architecture else tested.build()
    model = models.rebuild(folder, model=template)
    np.save(folder / "answers.npy", outputs.torch_answer(model)(tested.images().numpy()))


def _answers_without_nni(name: str, folder: Path) -> np.ndarray:
    script = (
        "import sys; sys.modules['nni'] = None; from pathlib import Path; from bench.coverage import answer; "
        "answer(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))"
    )
    command = [sys.executable, "-c", script, name, str(folder), str(torch.get_num_threads())]
    subprocess.run(command, check=True, timeout=LIMIT_S)
    return np.load(folder / "answers.npy")


def _onnx_difference(model: nn.Module, tested: Subject, folder: Path, expected: np.ndarray) -> float:
    path = folder / "model.onnx"
    onnx_export.export(model, path, input_size=tested.input_size)
    with RUNTIMES["onnxruntime"].load(path, BuildSpec(tested.input_size, static=False)) as session:
        return CLASSIFICATION.compare(expected, session.run(tested.images().numpy())).relative


def _in_a_process(name: str, module: str) -> Row:
    """The row that `measure` of a module makes, or one that says how the process ended."""
    script = (
        f"import json, sys; from pathlib import Path; from {module} import measure; "
        "row = measure(sys.argv[1], Path(sys.argv[2])); Path(sys.argv[2], 'row.json').write_text(json.dumps(row))"
    )
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", script, name, folder]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        except subprocess.TimeoutExpired:
            return {"model": name, "error": f"did not end within {LIMIT_S} s"}
        if done.returncode == 0:
            return json.loads(Path(folder, "row.json").read_text())
    said = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
    return {"model": name, "error": f"ended with code {done.returncode}: {said[0]}"}


# ---- the table ----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help="rows to make; all by default", metavar="MODELS")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--again", action="store_true", help="make rows again that are there already")
    options = parser.parse_args()
    unknown = sorted(set(options.models) - set(names()))
    if unknown:
        parser.error(f"{unknown[0]} is no row of the table; the rows are {', '.join(names())}")
    versions = machine.describe(1).versions
    path = options.out / "coverage.json"
    found = json.loads(path.read_text()) if path.exists() else {"versions": versions, "rows": []}
    rows = {row["model"]: row for row in found["rows"]} if found["versions"] == versions else {}

    def keep(name: str, row: Row) -> None:
        rows[name] = row
        ordered = [rows[key] for key in names() if key in rows]
        command = "python -m bench.coverage"
        write_text(path, json.dumps({"versions": versions, "command": command, "rows": ordered}, indent=1) + "\n")
        write_text(options.out / "coverage.md", coverage_table.table(ordered, versions, command))

    for name in options.models or names():
        if options.again or name not in rows or "error" in rows[name]:
            keep(name, _in_a_process(name, "bench.coverage"))
            print(coverage_table.line(rows[name]), flush=True)
        if "error" not in rows[name] and "files" not in rows[name].get("quantized", {}):
            keep(name, rows[name] | {"quantized": _in_a_process(name, "bench.coverage_quantized")})
            print(coverage_table.quantized_line(rows[name]), flush=True)
    if not all(all(coverage_table.passes(rows[name]).values()) for name in options.models or names()):
        sys.exit(1)


if __name__ == "__main__":
    main()
