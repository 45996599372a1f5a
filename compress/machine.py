"""The machine that a number depends on."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

from compress.report import Environment

INT8_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8")
PACKAGES = (
    "torch",
    "torchvision",
    "nni",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt-rtx",
    "numpy",
)


DOT_PRODUCT = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"}
"""Instructions that multiply and add int8 into 32 bits; without one, sums of products saturate at 16 bits."""


def has_int8_dot_product() -> bool:
    return bool(_cpu()[1] & DOT_PRODUCT)


def describe(threads: int) -> Environment:
    cpu, flags = _cpu()
    return Environment(
        cpu=cpu,
        cpu_features=tuple(feature for feature in INT8_FEATURES if feature in flags),
        cores=os.cpu_count() or 1,
        gpu=_gpu(),
        threads=threads,
        versions={
            "python": platform.python_version(),
            **{name: version for name in PACKAGES if (version := _version(name))},
        },
    )


def _cpu() -> tuple[str, frozenset[str]]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine(), frozenset()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    return facts.get("model name", platform.machine()), frozenset(facts.get("flags", "").split())


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
