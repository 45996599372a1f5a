"""Makes the Nth system call fail that changes the disk below a folder, whoever makes it: Python, SQLite, Rust or C++.

The work runs in a forked child under a seccomp filter that asks its parent before each such call (user notification,
seccomp(2)), so the error comes from where a full disk's would.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import socket
import struct
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

BY_DESCRIPTOR = {"write": 1, "pwrite64": 18, "writev": 20, "pwritev": 296, "fsync": 74, "fdatasync": 75, "ftruncate": 77,
                 "fallocate": 285}  # fmt: skip
BY_PATH = {"rename": (82, 1), "renameat": (264, 3), "renameat2": (316, 3), "mkdir": (83, 0), "mkdirat": (258, 1),
           "link": (86, 1), "linkat": (265, 3), "openat": (257, 1)}  # fmt: skip
"""Number on x86-64, and which argument is the path that appears on the disk."""
OPENAT_FLAGS = 2
_PATHS = dict(BY_PATH.values())
_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_NOTIFICATION, _ANSWER = struct.Struct("=QIIiIQ6Q"), struct.Struct("=QqiI")
_CONTINUE = 1
_SECCOMP, _SET_FILTER, _NEW_LISTENER, _NO_NEW_PRIVS = 317, 1, 8, 38
_ASK, _ALLOW = 0x7FC00000, 0x7FFF0000
LONGEST_PATH = 4096


@dataclass(frozen=True)
class Fault:
    nth: int
    """1 is the first call; 0 lets all of them through."""
    number: int
    """errno, such as ENOSPC."""
    lasting: bool
    """All later calls fail as well, as on a disk that stays full."""

    def __str__(self) -> str:
        return f"{errno.errorcode[self.number]} at write {self.nth}{' and after' if self.lasting else ''}"

    def hits(self, count: int) -> bool:
        return self.nth > 0 and (count >= self.nth if self.lasting else count == self.nth)


@dataclass(frozen=True)
class Ended:
    status: int
    """Exit status of the work: 0 when it returned True, 1 for False, 99 for an exception, negative for a signal."""
    calls: int
    """That changed the disk below the folder, failed ones included."""


def carry_out(work: Callable[[], bool], folder: Path, fault: Fault) -> Ended:
    """Forks, and carries `work` out in the child with the fault."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        pid = os.fork()
        if pid == 0:
            _child(work, theirs)
        theirs.close()
        _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
        calls = _supervise(descriptors[0], str(folder.resolve()), fault)
        os.close(descriptors[0])
    return Ended(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), calls)


def _child(work: Callable[[], bool], theirs: socket.socket) -> None:
    """Never returns."""
    status = 99
    try:
        listener = _install()
        socket.send_fds(theirs, [b"x"], [listener])
        os.close(listener)
        theirs.close()
        status = 0 if work() else 1
    except BaseException:  # noqa: BLE001 - the parent has to see that there was one
        traceback.print_exc()
    finally:
        os._exit(status)


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def _install() -> int:
    """The descriptor through which the calls are asked about."""
    numbers = [*BY_DESCRIPTOR.values(), *_PATHS]
    program = [(0x20, 0, 0, 0)]  # load the number of the call
    program += [(0x15, len(numbers) - index, 0, number) for index, number in enumerate(numbers)]
    program += [(0x06, 0, 0, _ALLOW), (0x06, 0, 0, _ASK)]
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    listener = libc.syscall(_SECCOMP, _SET_FILTER, _NEW_LISTENER, ctypes.byref(_Program(len(program), code)))
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return listener


def _supervise(listener: int, folder: str, fault: Fault) -> int:
    """Answers until no process is left under the filter; how many calls there were."""
    calls, poll = 0, select.poll()
    poll.register(listener, select.POLLIN)
    while True:
        ((_, events),) = poll.poll()
        if events & select.POLLHUP:
            return calls
        buffer = bytearray(_NOTIFICATION.size)
        try:
            fcntl.ioctl(listener, _RECEIVE, buffer)
        except FileNotFoundError:  # whoever asked was killed
            continue
        key, pid, _, number, _, _, *arguments = _NOTIFICATION.unpack(buffer)
        counts = _below(folder, pid, number, arguments)
        calls += counts
        failed = counts and fault.hits(calls)
        answer = _ANSWER.pack(key, 0, -fault.number if failed else 0, 0 if failed else _CONTINUE)
        try:
            fcntl.ioctl(listener, _SEND, bytearray(answer))
        except FileNotFoundError:
            continue


def _below(folder: str, pid: int, number: int, arguments: list[int]) -> bool:
    """Whether the call changes something below the folder."""
    try:
        if number not in _PATHS:
            return os.readlink(f"/proc/{pid}/fd/{arguments[0] & 0xFFFFFFFF}").startswith(folder)
        if number == BY_PATH["openat"][0] and not arguments[OPENAT_FLAGS] & os.O_CREAT:
            return False
        path = os.path.join(os.readlink(f"/proc/{pid}/cwd"), _text(pid, arguments[_PATHS[number]]))
    except (FileNotFoundError, ProcessLookupError):
        return False
    return os.path.normpath(path).startswith(folder)


def _text(pid: int, address: int) -> str:
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        data = b""
        while b"\0" not in data and len(data) < LONGEST_PATH:  # page by page: the next one may not be there
            memory.seek(address + len(data))
            data += memory.read(LONGEST_PATH - (address + len(data)) % LONGEST_PATH)
    return os.fsdecode(data.split(b"\0")[0])
