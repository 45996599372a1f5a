"""A process in which a runtime compiles and executes: a crash there costs the runtime, not the run.

It is started with the runtime's class, carries out one order at a time (`engines.worker`), and ends with this program.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn, Self

import numpy as np

from compress import processes
from compress.engines.base import Runtime
from compress.engines.processes import wire
from compress.errors import MORE_MEMORY, OTHER_RUNTIME, EngineError

SILENT_S = 300.0
"""Without computing anything, after which a runtime counts as hanging; shorter than what counts for a whole run."""
LONGEST_S = 3600.0
"""For one order: an engine of a large network is built in minutes."""
IDLE_S = 15.0
"""Without a loaded file and without an order, after which a process ends: a run trains for hours between two orders."""
TICK_S = 1.0
CONSOLE_BYTES = 1 << 20
"""Of what a runtime prints, at most this much is kept until it ends."""
LAST_WORDS = 500
_NO_MEMORY = "std::bad_alloc"

log = logging.getLogger("compress")


class Retired(Exception):
    """The process ended by itself before it got the order."""


class RuntimeProcess:
    """One process of a runtime. Use it as a context manager, or call `end`.

    Raises:
        EngineError: it cannot be started.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._failure: tuple[str, str] | None = None
        """What happened, and what to do next, once the process is gone."""
        self._folder = Path(tempfile.mkdtemp(prefix="espalier-"))  # also for what a killed library leaves
        self._console = (self._folder / "console").open("ab+")
        ours, theirs = socket.socketpair()
        lifeline, self._lifeline = os.pipe()
        memory = os.memfd_create("espalier")
        self._channel = wire.Channel(Connection(ours.detach()), memory)
        files = (theirs.fileno(), memory, lifeline)
        try:
            self._process = self._started(files)
        except OSError as error:
            self._close()
            what = f"No process could be started for {runtime.title} ({error.strerror})."
            raise EngineError(runtime.name, what, MORE_MEMORY) from error
        finally:
            theirs.close()
            os.close(lifeline)
        # one that ends by itself, having nothing to do, would stay a zombie until somebody asks for it
        threading.Thread(target=self._process.wait, daemon=True).start()

    def _started(self, files: tuple[int, ...]) -> subprocess.Popen[bytes]:
        kind = type(self._runtime)
        words = [kind.__module__, kind.__qualname__, *map(str, files), str(IDLE_S)]
        path = os.pathsep.join(map(os.path.abspath, sys.path))
        return subprocess.Popen(  # noqa: S603  (our own words, no shell)
            [sys.executable, "-P", "-m", "compress.engines.processes.worker", *words],
            stdin=subprocess.DEVNULL,
            stdout=self._console,
            stderr=self._console,
            pass_fds=files,
            env={**os.environ, "PYTHONPATH": path, "TMPDIR": str(self._folder)},
        )

    @property
    def usable(self) -> bool:
        return self._failure is None and self._process.poll() is None

    def ask(
        self, order: str, doing: str, arguments: Mapping[str, Any], images: np.ndarray | None = None
    ) -> tuple[dict[str, Any], wire.Arrays]:
        """The answer to an order.

        Args:
            doing: end of a sentence about the runtime, such as `compiled model.onnx`.

        Raises:
            EngineError: the runtime refuses or fails, or its process ended, now or in an earlier order.
            OSError: a file cannot be read or written.
        """
        if self._failure:
            raise EngineError(self._runtime.name, *self._failure)
        try:
            sent = {} if images is None else {"images": images}
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # what became of it is found below
                self._channel.send({"order": order, "arguments": dict(arguments)}, sent)
            self._wait(doing)
            header, arrays = self._channel.receive()
        except (EOFError, ConnectionResetError):
            self._fail(*self._how_it_ended(doing))
        except ValueError:
            self._fail(f"broke off with a damaged answer while it {doing}")
        except BaseException:
            self.end()
            raise
        if header.get("retired"):
            self.end()
            raise Retired
        self._refuse(header, doing)
        return header, arrays

    def _wait(self, doing: str) -> None:
        """Until there is an answer, or nobody who could give one."""
        start = worked = time.monotonic()
        ticks = processes.own_ticks(self._process.pid)
        while not self._channel.poll(TICK_S) and self._process.poll() is None:
            if os.fstat(self._console.fileno()).st_size > CONSOLE_BYTES:
                self._console.truncate(0)
            now, before, ticks = time.monotonic(), ticks, processes.own_ticks(self._process.pid)
            worked = now if ticks > before else worked
            if now - worked > SILENT_S:
                self._fail(f"was ended, because it computed nothing for {SILENT_S / 60:g} minutes while it {doing}")
            if now - start > LONGEST_S:
                self._fail(f"was ended, because after {LONGEST_S / 60:g} minutes it still {doing}")

    def _how_it_ended(self, doing: str) -> tuple[str, str]:
        """End of the sentence, and what to do next."""
        try:
            code = self._process.wait(TICK_S)
        except subprocess.TimeoutExpired:
            return f"broke off while it {doing}", OTHER_RUNTIME
        if code == -signal.SIGKILL:
            how = f"was killed (signal 9) while it {doing}, as happens when the machine runs out of memory"
            return how, MORE_MEMORY
        how = f"ended by {_name(-code) if code < 0 else f'exit code {code}'} while it {doing}"
        return (f"{how}, out of memory", MORE_MEMORY) if _NO_MEMORY in self._last_words() else (how, OTHER_RUNTIME)

    def _fail(self, how: str, advice: str = OTHER_RUNTIME) -> NoReturn:
        """Ends the process, and with it all that was loaded."""
        self._log_output()
        self._failure = f"{self._runtime.title} {how}.", advice
        self.end()
        raise EngineError(self._runtime.name, *self._failure)

    def _refuse(self, header: Mapping[str, Any], doing: str) -> None:
        if "os_error" in header:
            raise OSError(*header["os_error"])
        detail = header.get("detail", "")
        if detail:
            log.info("%s, when it %s, said: %s", self._runtime.name, doing, detail)
            self._log_output()
        if "refused" in header:
            raise EngineError(self._runtime.name, header["refused"], header["advice"], detail)
        if "failed" in header:
            why = "ran out of memory" if header["memory"] else "failed"
            where = f", at {header['failed']}" if header["failed"] else ""
            what = f"{self._runtime.title} {why} while it {doing}{where}."
            raise EngineError(self._runtime.name, what, MORE_MEMORY if header["memory"] else OTHER_RUNTIME, detail)

    def _log_output(self) -> None:
        if last := self._last_words():
            log.info("last output of %s: %s", self._runtime.name, last)

    def _last_words(self) -> str:
        self._console.seek(max(0, self._console.seek(0, os.SEEK_END) - 4096))
        lines = self._console.read().decode("utf-8", errors="replace").splitlines()
        last = next((line for line in reversed(lines) if line.strip()), "")
        return "".join(letter for letter in last if letter.isprintable())[-LAST_WORDS:]

    def end(self) -> None:
        """With whatever it holds and does; it may be called again."""
        self._failure = self._failure or (f"{self._runtime.title} was ended.", "Load the file again.")
        if self._console.closed:
            return
        self._process.kill()
        self._process.wait()
        self._close()

    def abandon(self) -> None:
        """In a copy of this program that `os.fork` made: the process belongs to the other one."""
        self._failure = f"{self._runtime.title} belongs to another process.", "Load the file again."
        self._channel.close()
        os.close(self._lifeline)
        self._console.close()

    def _close(self) -> None:
        self._channel.close()
        os.close(self._lifeline)
        self._console.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def _name(number: int) -> str:
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"
