"""The device and pycuda of `gpu_double`."""

from __future__ import annotations

import importlib.machinery
import itertools
import types
from collections.abc import Callable

import numpy as np


class Gpu:
    """The device: what is allocated and current on it, and what was called, in order."""

    def __init__(self, name: str = "Example GPU", capability: tuple[int, int] = (8, 9), count: int = 1) -> None:
        self.name, self.capability, self.count = name, capability, count
        self.memory: dict[int, bytearray] = {}
        self.pinned: list[np.ndarray] = []
        self.streams: dict[int, list[Callable[[], None]]] = {}
        self.current = self.retained = 0
        self.calls: list[str] = []
        self.problems: list[str] = []
        self.failing: set[str] = set()
        self.addresses = itertools.count(4096, 4096)

    def call(self, name: str, needs_context: bool = True) -> None:
        if needs_context and not self.current:
            self.problems.append(f"{name} without a current context")
        self.calls.append(name)

    def holds_nothing(self) -> bool:
        return not self.memory and not self.current and self.retained <= 1 and not self.problems

    def buffer(self, address: int, nbytes: int) -> memoryview:
        """The first bytes of an allocation; overrunning it is an error here, on a device it is not."""
        if len(self.memory[address]) < nbytes:
            raise AssertionError(f"{nbytes} bytes at an allocation of {len(self.memory[address])}")
        return memoryview(self.memory[address])[:nbytes]


def pycuda_driver(gpu: Gpu) -> types.ModuleType:  # noqa: C901 - classes, not branches
    """The part of pycuda.driver 2026.1 that may be used, as its source has it."""

    class Error(Exception):
        pass

    class Context:
        def push(self) -> None:
            gpu.call("push", needs_context=False)
            gpu.current += 1

        @staticmethod
        def pop() -> None:
            gpu.call("pop")
            gpu.current -= 1

    class Device:
        def __init__(self, number: int) -> None:
            assert 0 <= number < gpu.count

        @staticmethod
        def count() -> int:
            return gpu.count

        def name(self) -> str:
            return gpu.name

        def compute_capability(self) -> tuple[int, int]:
            return gpu.capability

        def retain_primary_context(self) -> Context:
            gpu.retained += 1
            return Context()

    class Stream:
        def __init__(self) -> None:
            gpu.call("Stream")
            self.handle = next(gpu.addresses)
            gpu.streams[self.handle] = []

        def synchronize(self) -> None:
            gpu.call("synchronize")
            waiting, gpu.streams[self.handle] = gpu.streams[self.handle], []
            for work in waiting:
                work()

    class DeviceAllocation:
        def __init__(self, nbytes: int) -> None:
            self.address = next(gpu.addresses)
            gpu.memory[self.address] = bytearray(nbytes)

        def __int__(self) -> int:
            return self.address

        def free(self) -> None:
            gpu.call("free")
            del gpu.memory[self.address]

    def mem_alloc(nbytes: int) -> DeviceAllocation:
        gpu.call("mem_alloc")
        if f"mem_alloc {gpu.calls.count('mem_alloc')}" in gpu.failing:
            raise Error("cuMemAlloc failed: out of memory")
        return DeviceAllocation(nbytes)

    def pagelocked_empty(shape: tuple[int, ...], dtype: type) -> np.ndarray:
        gpu.call("pagelocked_empty")
        gpu.pinned.append(np.full(shape, np.nan, dtype))
        return gpu.pinned[-1]

    def check_host(array: np.ndarray) -> None:
        if not any(array is whole or array.base is whole for whole in gpu.pinned) or not array.flags.c_contiguous:
            gpu.problems.append("an asynchronous copy needs contiguous page-locked memory")

    def memcpy_htod_async(dest: DeviceAllocation, src: np.ndarray, stream: Stream) -> None:
        gpu.call("memcpy_htod_async")
        check_host(src)
        gpu.buffer(int(dest), src.nbytes)

        def copy() -> None:
            gpu.buffer(int(dest), src.nbytes)[:] = src.tobytes()

        gpu.streams[stream.handle].append(copy)

    def memcpy_dtoh_async(dest: np.ndarray, src: DeviceAllocation, stream: Stream) -> None:
        gpu.call("memcpy_dtoh_async")
        check_host(dest)
        gpu.buffer(int(src), dest.nbytes)

        def copy() -> None:
            dest[:] = np.frombuffer(gpu.buffer(int(src), dest.nbytes), dest.dtype).reshape(dest.shape)

        gpu.streams[stream.handle].append(copy)

    def init() -> None:
        if "init" in gpu.failing:
            raise Error("cuInit failed: no CUDA-capable device is detected")

    driver = new_module("pycuda.driver")
    for part in (
        Error,
        Context,
        Device,
        Stream,
        mem_alloc,
        pagelocked_empty,
        memcpy_htod_async,
        memcpy_dtoh_async,
        init,
    ):
        setattr(driver, part.__name__, part)
    return driver


def new_module(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    return module
