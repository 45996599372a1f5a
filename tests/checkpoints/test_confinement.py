"""What a confined process can still do: compute, and write what is open. And that checkpoints are opened in one."""

from __future__ import annotations

import errno
import json
import platform
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoint_files import small_state

from compress.checkpoints import inspection, sandboxed, seccomp
from compress.checkpoints.loader import Loader
from compress.errors import CheckpointError, StorageError
from compress.files import INSTALLATION

pytestmark = pytest.mark.integration

PROGRAM = """
import json, os, socket, subprocess
from compress.checkpoints.seccomp import confine

def outcome(action):
    try:
        action()
    except Exception as error:
        return type(error).__name__
    return "worked"

parent, status = os.getppid(), open("/proc/self/status")
written = os.open("out", os.O_WRONLY | os.O_CREAT)
confine(memory_bytes=2**28, cpu_s=20, file_bytes=2**10)
told = dict(line.split(":\\t", 1) for line in status.read().splitlines())
print(json.dumps({
    "compute": outcome(lambda: sum(range(1000))),
    "write what is open": outcome(lambda: os.write(written, b"x")),
    "privileges": told["NoNewPrivs"], "seccomp": told["Seccomp"],
    "read a file": outcome(lambda: open("/etc/hostname")),
    "write a file": outcome(lambda: open("out", "w")),
    "list a folder": outcome(lambda: os.listdir("/")),
    "remove a file": outcome(lambda: os.unlink("out")),
    "make a link": outcome(lambda: os.symlink("a", "b")),
    "open a socket": outcome(socket.socket),
    "open a pipe": outcome(os.pipe),
    "fork": outcome(os.fork),
    "execute": outcome(lambda: os.execv("/bin/true", ["true"])),
    "start a command": outcome(lambda: subprocess.run(["true"])),
    "signal": outcome(lambda: os.kill(parent, 0)),
    "take memory": outcome(lambda: bytearray(2**29)),
}))
"""


def test_a_confined_process_computes_and_nothing_else(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env={"PYTHONPATH": str(INSTALLATION)},
    )
    found = json.loads(done.stdout)
    assert (found.pop("compute"), found.pop("write what is open")) == ("worked", "worked")
    assert (found.pop("privileges"), found.pop("seccomp")) == ("1", "2")
    assert found.pop("take memory") == "MemoryError"
    assert set(found.values()) == {"PermissionError"}, found


ORPHAN = """
import os, sys, time
from compress.checkpoints.seccomp import die_with_parent
parent, pid = os.getpid(), os.fork()
if pid == 0:
    die_with_parent(parent)
    print(os.getpid(), flush=True)
    time.sleep(60)
time.sleep(60)
"""


def test_a_child_ends_with_its_parent():
    environment = {"PYTHONPATH": str(INSTALLATION)}
    parent = subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True, env=environment)
    with parent:
        child = Path(f"/proc/{parent.stdout.readline().strip()}")
        assert child.is_dir()
        parent.kill()
    deadline = time.monotonic() + 20
    while child.is_dir() and "Z" not in (child / "stat").read_text().rpartition(")")[2] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.is_dir() or "Z" in (child / "stat").read_text().rpartition(")")[2]


def test_a_child_whose_parent_is_gone_already_ends():
    code = "from compress.checkpoints.seccomp import die_with_parent; die_with_parent(1 << 30); print('lives')"
    environment = {"PYTHONPATH": str(INSTALLATION)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, timeout=60)
    assert (done.returncode, done.stdout) == (1, b"")


# ---- the kernel's filter, instruction by instruction ------------------------------------------------------------------

ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def verdict(call: int, architecture: int) -> int:
    """What the filter answers, carried out as the kernel does it (classic BPF)."""
    program = list(struct.iter_unpack("=HBBI", seccomp._filter()))
    at, accumulator, data = 0, 0, struct.pack("=II", call, architecture)
    while True:
        code, if_true, if_false, constant = program[at]
        at += 1
        if code == 0x20:
            accumulator = struct.unpack_from("=I", data, constant)[0]
        elif code == 0x15:
            at += if_true if accumulator == constant else if_false
        elif code == 0x06:
            return constant
        else:
            raise AssertionError(f"instruction {code:#x}")


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_only_the_listed_calls_of_this_architecture_are_allowed(machine, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    own, column = ARCHITECTURES[machine], list(ARCHITECTURES).index(machine)
    listed = {call[column] for call in seccomp._CALLS.values()}
    assert {call for call in range(1000) if verdict(call, own) == ALLOW} == listed
    assert {verdict(call, own) for call in range(1000)} == {ALLOW, REFUSE}
    assert {verdict(call | 0x40000000, own) for call in range(1000)} == {REFUSE}, "calls of x32"


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_calls_of_another_architecture_end_the_process(machine, monkeypatch):
    """By `int 0x80` a 64-bit process makes 32-bit calls, whose numbers mean something else."""
    monkeypatch.setattr(platform, "machine", lambda: machine)
    for other in (0x40000003, 0x40000028, *(set(ARCHITECTURES.values()) - {ARCHITECTURES[machine]})):
        assert {verdict(call, other) for call in range(500)} == {KILL}


def test_the_list_of_calls_is_this_one():
    """Longer means more that a hole in a loader can do: add to both only what reading bytes needs."""
    assert set(seccomp._CALLS) == set(
        "read write close fstat lseek mmap mprotect munmap brk rt_sigaction rt_sigprocmask rt_sigreturn pread64 sched_yield "
        "mremap madvise getpid exit gettid futex clock_gettime exit_group getrandom".split()
    )


def test_other_machines_are_told_from_those_that_can_confine(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(OSError, match="seccomp is set up for Linux"):
        seccomp.confine(memory_bytes=2**40, cpu_s=10**6, file_bytes=2**40)


# ---- and that a checkpoint is opened in such a process ----------------------------------------------------------------

CARRY_OUT = """
import json, os, resource, sys
from compress.checkpoints import sandboxed

def opens(*_):
    open("/etc/hostname").close()
    return b"opened"

def allocates(*_):
    bytearray(2**30)
    return b"allocated"

def computes(*_):
    while True:
        sum(range(10**6))

def writes(*_):
    return bytes(2**20)

def reads(*_):
    return b"read"

def cannot(**_):
    raise OSError("no seccomp")

folder, ends = sys.argv[1], {}
for loader in (opens, allocates, computes, writes, reads, cannot):
    order = sandboxed.Order(source=f"{folder}/a.pth", target=f"{folder}/{loader.__name__}", is_zip=True, keys=[], tensors={},
                            metadata={}, memory_bytes=2**28, cpu_s=2, file_bytes=2**16)
    parent, pid = os.getpid(), os.fork()
    if pid == 0:
        sandboxed.unpack = reads if loader is cannot else loader
        if loader is cannot:
            sandboxed.confine = cannot
        sandboxed._carry_out(order, parent)
    _, status, used = os.wait4(pid, 0)
    ends[loader.__name__] = os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
print(json.dumps(ends))
"""


@pytest.fixture(scope="module")
def ends(tmp_path_factory) -> dict[str, tuple[int, bytes, float]]:
    """How a child ends in which another function stands for the loader, what it wrote, and its seconds of computing."""
    folder = tmp_path_factory.mktemp("ends")
    (folder / "a.pth").write_bytes(b"x")
    done = subprocess.run([sys.executable, "-c", CARRY_OUT, folder], capture_output=True, check=True, timeout=120)
    return {name: (end, (folder / name).read_bytes(), used) for name, (end, used) in json.loads(done.stdout).items()}


def test_what_the_loader_does_is_done_in_confinement(ends):
    assert ends["reads"][:2] == (sandboxed.WRITTEN, b"read")
    for name in ("opens", "allocates", "writes"):
        status, content, _ = ends[name]
        assert status == sandboxed.UNREADABLE or status < 0, name
        assert len(content) <= 2**16 and content not in (b"opened", b"allocated")


def test_a_loader_that_computes_for_ever_is_ended(ends):
    status, content, used = ends["computes"]
    assert status < 0 and content == b"" and used < 5, "after the 2 s that its order gives it"


def test_without_confinement_the_file_is_not_looked_at(ends):
    assert ends["cannot"][:2] == (sandboxed.NOT_CONFINED, b"")


class Answers(Loader):
    """Tells how its child ended, without one."""

    def __init__(self, status: int | None) -> None:
        self.status = status

    def _carry_out(self, order: sandboxed.Order) -> int | None:
        return self.status


@pytest.mark.parametrize(
    "status, kind, words",
    [
        (sandboxed.NOT_CONFINED, CheckpointError, "does not let a process be confined"),
        (sandboxed.NO_ROOM, StorageError, "The disk is full"),
        (sandboxed.UNREADABLE, CheckpointError, "its tensors cannot be read"),
        (-9, CheckpointError, "its tensors cannot be read"),
        (None, CheckpointError, "ended or took too long"),
    ],
)
def test_every_other_end_is_a_refusal(status, kind, words, tmp_path):
    path = tmp_path / "a.pth"
    torch.save(small_state(), path)
    with pytest.raises(kind, match=words):
        Answers(status).unpack(path, inspection.inspect(path), tmp_path / "out", {})


@pytest.mark.parametrize(
    "written",
    [
        {"w": torch.zeros(2)},
        small_state() | {"0.bias": torch.zeros(3)},
        small_state() | {"0.bias": small_state()["0.bias"].half()},
        {name: value for name, value in small_state().items() if name != "0.bias"},
        small_state() | {"more": torch.zeros(1)},
    ],
)
def test_what_a_child_wrote_is_compared_with_the_description(written, tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "a.pth"
    torch.save(small_state(), path)
    save_file(written, tmp_path / "out")
    with pytest.raises(CheckpointError, match="its tensors cannot be read"):
        Answers(sandboxed.WRITTEN).unpack(path, inspection.inspect(path), tmp_path / "out", {})
    save_file(small_state(), tmp_path / "out", {"class_names": "x"})
    with pytest.raises(CheckpointError, match="its tensors cannot be read"):
        Answers(sandboxed.WRITTEN).unpack(path, inspection.inspect(path), tmp_path / "out", {})
    save_file(small_state(), tmp_path / "out")
    Answers(sandboxed.WRITTEN).unpack(path, inspection.inspect(path), tmp_path / "out", {})


@pytest.mark.parametrize(
    "tensors",
    [{"0.bias": ("float32", [3])}, {"0.bias": ("float64", [4])}, {"missing": ("float32", [1])}],
)
def test_what_torch_loads_is_compared_with_the_description(tensors, tmp_path):
    path = tmp_path / "a.pth"
    torch.save(small_state(), path)
    with path.open("rb") as file, pytest.raises((ValueError, KeyError)):
        sandboxed.unpack(file, True, [], tensors, {})


@pytest.mark.parametrize("value", [torch.eye(2).to_sparse(), torch.ones(2, device="meta"), [1.0]])
def test_only_tensors_of_numbers_come_out(value, monkeypatch):
    monkeypatch.setattr(sandboxed, "_load", lambda *_: {"w": value})
    with pytest.raises(ValueError, match="not a tensor of numbers"):
        sandboxed.unpack(None, True, [], {"w": ("float32", [2])}, {})


@pytest.mark.parametrize(
    "found", [b"no json", b"[]", b'{"what": "not finite", "tensor": "<b>", "count": 1}', b'{"a": 1}']
)
def test_what_a_child_says_is_foreign_text(found, tmp_path):
    path = tmp_path / "a.pth"
    torch.save(small_state(), path)
    (tmp_path / "out").write_bytes(found)
    with pytest.raises(CheckpointError, match="its tensors cannot be read"):
        Answers(sandboxed.FOUND).unpack(path, inspection.inspect(path), tmp_path / "out", {})
