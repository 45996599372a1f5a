"""The only import of NNI 3.0, an archived library whose import and algorithms change things for the whole process.

Importing it overwrites torch's own pytree registrations, attaches a handler to stdout and sets a log level; running its
algorithms prints, logs hundreds of lines and draws from every random generator. All of that is undone here.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import logging
import random
import warnings
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree

from compress.tracing.layers import torch_base

_LOGGERS = ("nni", "Shape Dependency")
_SILENT = logging.CRITICAL + 1


@functools.cache
def import_nni() -> ModuleType:
    """Import NNI once with its side effects undone, and return it."""
    with _pytree_kept(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nni = importlib.import_module("nni")
        for name in ("nni.compression.pruning", "nni.compression.quantization", "nni.compression.speedup"):
            importlib.import_module(name)
    nni.silence_stdout()
    logging.getLogger("nni").setLevel(logging.NOTSET)
    return nni


def load(name: str) -> ModuleType:
    """Return NNI's submodule `name`, such as "nni.compression.pruning", imported without side effects."""
    import_nni()
    return importlib.import_module(name)


def know_subclasses(model: nn.Module, layers: Iterable[str]) -> None:
    """Let NNI treat layers whose class inherits from one of torch's as that one; it goes by the names of classes."""
    registry = load("nni.compression.base.setting").PruningSetting.registry
    for kind in {type(model.get_submodule(layer)) for layer in layers}:
        base = torch_base(kind).__name__
        if kind.__name__ != base and base in registry:
            registry[kind.__name__] = registry[base]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Run an NNI algorithm without its prints and log lines, and leave every random generator as it was."""
    import_nni()
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    try:
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(_SILENT)
        with _pytree_kept(), random_state_kept(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore the random generators of Python, numpy and torch (CUDA included where it is in use) on leaving."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if _cuda_in_use() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def _cuda_in_use() -> bool:
    return bool(torch.cuda.is_initialized())


@contextlib.contextmanager
def _pytree_kept() -> Iterator[None]:
    """Put back the pytree registrations that NNI overwrites (torch.fx's immutable list and dict)."""
    # torch registers these two while it imports this module: without that, NNI's would count as the first.
    importlib.import_module("torch.fx.immutable_collections")
    registries: tuple[dict[Any, Any], ...] = (
        _pytree.SUPPORTED_NODES,
        _pytree.SUPPORTED_SERIALIZED_TYPES,
        _pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE,
    )
    before = [dict(registry) for registry in registries]
    try:
        yield
    finally:
        for registry, saved in zip(registries, before, strict=True):
            registry.update(saved)
        names, saved_names = registries[2], before[2]
        if _pytree.NO_SERIALIZED_TYPE_NAME_FOUND not in saved_names:
            names.pop(_pytree.NO_SERIALIZED_TYPE_NAME_FOUND, None)
