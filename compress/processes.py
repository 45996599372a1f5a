"""Child processes by the group: started apart from the server, recognised after its restart, ended without remains.

A child leads its own session, so its process id is also the id of its group; whatever it starts belongs to the group
and ends with it. A process is recognised by its id together with the time it was born, because ids are given out again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.files import INSTALLATION

PROC = Path("/proc")
POLL_S = 0.05
DEAD = ("Z", "X")

ENVIRONMENT = (
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "LANG",
    "LANGUAGE",
    "TZ",
    "TMPDIR",
    "LD_LIBRARY_PATH",
    "VIRTUAL_ENV",
    "XDG_CACHE_HOME",
    "XDG_CONFIG_HOME",
    "ESPALIER_SIGNING_KEY",
    "TORCH_HOME",
    "HF_HOME",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "REQUESTS_CA_BUNDLE",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
)
ENVIRONMENT_PREFIXES = ("LC_", "CUDA_", "NVIDIA_", "OMP_", "MKL_", "OPENBLAS_", "COVERAGE_PROCESS_")
"""All that a child may see of the server's environment: what finds its libraries and devices, and no secret."""


@dataclass(frozen=True)
class Child:
    """A started process; `birth` tells it from a later one with the same id."""

    pid: int
    birth: str


def child_environment() -> dict[str, str]:
    """What a child sees: libraries and devices, this installation of Espalier, and no secret."""
    passed = {
        name: os.environ[name] for name in os.environ if name in ENVIRONMENT or name.startswith(ENVIRONMENT_PREFIXES)
    }
    return passed | {"PYTHONPATH": str(INSTALLATION), "PYTHONUNBUFFERED": "1"}


def start(
    command: Sequence[str], *, folder: Path, console: Path | None, env: Mapping[str, str], keep: Sequence[int] = ()
) -> subprocess.Popen[bytes]:
    """Starts `command` in a session of its own. Raises OSError.

    Args:
        console: the file that what it prints goes to; None is where this process prints.
        keep: open files that it inherits, by their descriptors.
    """
    with console.open("wb") if console else contextlib.nullcontext() as output:
        return subprocess.Popen(  # noqa: S603  (a list of our own words, no shell)
            list(command),
            cwd=folder,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            close_fds=True,
            pass_fds=tuple(keep),
        )


def identify(pid: int) -> Child | None:
    """The process with this id, which may be a zombie; None when there is none."""
    fields = _stat(pid)
    return None if fields is None else Child(pid, f"{_boot_id()}:{fields[19]}")


def alive(child: Child) -> bool:
    """A zombie is not alive."""
    fields = _stat(child.pid)
    return fields is not None and _lives(fields) and child.birth == f"{_boot_id()}:{fields[19]}"


def living(child: Child) -> list[int]:
    """Ids of the living processes of the child's group; empty when its id belongs to another process now."""
    if identify(child.pid) not in (child, None) or not child.birth.startswith(_boot_id()):
        return []
    return [
        pid for pid in _pids() if (fields := _stat(pid)) is not None and _lives(fields) and int(fields[2]) == child.pid
    ]


def find(argument: str) -> list[int]:
    """Ids of the living processes that were started with `argument` as one of their arguments."""
    wanted = argument.encode()
    return [pid for pid in _pids() if wanted in _arguments(pid)]


def send(child: Child, number: signal.Signals) -> None:
    """Signals all that lives of the child's group."""
    if living(child):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            return  # the last member ended between the look and the signal


def stop(child: Child, grace_s: float) -> bool:
    """Ends the group: SIGTERM, then SIGKILL after `grace_s` seconds. True when nobody of it lives any more."""
    for number, patience_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 2.0)):
        send(child, number)
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            if not living(child):
                return True
            time.sleep(POLL_S)
    return not living(child)


def reap(group: int) -> None:
    """Takes leave of the ended processes of a group that this process inherited, as the first one of a container does:
    until then they stay in the table of processes."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-group, os.WNOHANG)[0]:
            pass


def age_s(child: Child) -> float:
    """Seconds since the child was started, by a clock that nobody can set."""
    up = float((PROC / "uptime").read_text().split()[0])
    return up - int(child.birth.rpartition(":")[2]) / os.sysconf("SC_CLK_TCK")


def cpu_ticks(child: Child) -> int:
    """Processor time that the living processes of the child's group have used, in clock ticks."""
    return sum(int(ticks) for pid in living(child) if (fields := _stat(pid)) is not None for ticks in fields[11:15])


def own_ticks(pid: int) -> int:
    """Processor time that one process has used, in clock ticks; 0 when it is gone."""
    fields = _stat(pid)
    return 0 if fields is None else int(fields[11]) + int(fields[12])


def _pids() -> Iterator[int]:
    return (int(entry) for entry in os.listdir(PROC) if entry.isdigit())


def _lives(fields: Sequence[str]) -> bool:
    """A process whose first thread has ended is called a zombie while others, the device's for example, still end."""
    return fields[0] not in DEAD or int(fields[17]) > 1


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/<pid>/stat from `state` (index 0) on: 2 is the process group, 17 the
    number of threads, 19 the start in clock ticks."""
    try:
        text = (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text[text.rindex(")") + 2 :].split()  # the name before it may hold blanks and brackets


def _arguments(pid: int) -> list[bytes]:
    try:
        return (PROC / str(pid) / "cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return []


def _boot_id() -> str:
    return (PROC / "sys/kernel/random/boot_id").read_text().strip()
