"""What is compared, row by row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

OURS = "espalier"
"""The environment of Espalier's own rows: the one that the benchmark runs in."""


@dataclass(frozen=True)
class Row:
    """One way to compress the dense model."""

    name: str
    """Its folder, and what `--only` takes."""
    title: str
    environment: str
    """A file in requirements/, or `OURS`."""
    script: str
    options: dict[str, Any] = field(default_factory=dict)
    reference: bool = False
    """The dense model: measured, and no rival."""

    @property
    def ours(self) -> bool:
        return self.environment == OURS and not self.reference


def _espalier() -> list[Row]:
    """`tune` and `qat` are shares of the budget; the rest are fields of a request."""
    both = {"tune": 5 / 6, "qat": 1 / 6}
    calibrated = {"tune": 0, "qat": 0, "pruner": "none", "quantizer": "ptq"}
    floats = {"tune": 1, "qat": 0, "sparsity": 0.5, "quantizer": "none"}
    return [
        Row("espalier-ptq", "Espalier, PTQ alone", OURS, "espalier_run", calibrated),
        *(
            Row(
                f"espalier-{percent}",
                f"Espalier {percent} % + QAT",
                OURS,
                "espalier_run",
                both | {"sparsity": percent / 100},
            )
            for percent in (30, 50, 70)
        ),
        Row("espalier-50-float", "Espalier 50 %, fp32", OURS, "espalier_run", floats),
    ]


def _chains() -> list[Row]:
    """Torch-Pruning, and its chains with those that quantize."""
    rows = [Row("tp-50", "Torch-Pruning 50 %, fp32", "torch-pruning", "torch_pruning_float", {"ratio": 0.5})]
    for percent in (30, 50, 70):
        ratio, pruned = {"ratio": percent / 100}, f"Torch-Pruning {percent} %"
        rows += [
            Row(f"tp-{percent}-nncf-ptq", f"{pruned} + NNCF PTQ", "nncf", "nncf_ptq", ratio),
            Row(f"tp-{percent}-ort", f"{pruned} + ONNX Runtime PTQ", "onnxruntime", "onnxruntime_static", ratio),
        ]
    half = {"ratio": 0.5}
    return [
        *rows,
        Row("tp-50-nncf-qat", "Torch-Pruning 50 % + NNCF QAT", "nncf", "nncf_qat", half),
        Row(
            "tp-50-sgd-nncf-ptq", "Torch-Pruning 50 % (SGD at 0.04) + NNCF PTQ", "nncf", "nncf_ptq",
            half | {"optimizer": "sgd"},
        ),
        Row(
            "tp-50-isomorphic-nncf-ptq", "Torch-Pruning 50 % (global, isomorphic) + NNCF PTQ", "nncf", "nncf_ptq",
            half | {"isomorphic": True},
        ),
    ]  # fmt: skip


ROWS: tuple[Row, ...] = (
    Row("dense", "dense", OURS, "dense", reference=True),
    *_espalier(),
    *_chains(),
    Row("nncf-ptq", "NNCF PTQ", "nncf", "nncf_ptq"),
    Row("nncf-qat", "NNCF QAT", "nncf", "nncf_qat"),
    Row("ort-defaults", "ONNX Runtime PTQ, its defaults", "onnxruntime", "onnxruntime_static", {"defaults": True}),
    Row("ort-advised", "ONNX Runtime PTQ, as advised for the CPU", "onnxruntime", "onnxruntime_static"),
    Row("inc-ptq", "Neural Compressor PTQ", "neural-compressor", "neural_compressor_ptq"),
    Row("modelopt-qat", "ModelOpt INT8 QAT", "modelopt", "modelopt_qat"),
    Row(
        "modelopt-fastnas",
        "ModelOpt FastNAS, 30 % of the FLOPs, fp32",
        "modelopt",
        "modelopt_fastnas",
        {"flops": "30%"},
    ),
)
