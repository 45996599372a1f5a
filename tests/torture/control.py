"""The control: every hostile file does run its payload in the unsafe loader, each in a process thrown away after it.

`python -m torture.control` reads JSON lines (path, marker) and answers with a line of how many seconds each took, or
null for one that made no marker.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import time
from pathlib import Path

LIMIT_S, PATIENCE_S = 20, 3.0


def main() -> None:
    import torch  # once, for all that are forked

    assert torch.__version__
    for line in sys.stdin:
        path, marker = map(Path, json.loads(line))
        started = time.perf_counter()
        pid = os.fork()
        if pid == 0:
            _open_unsafely(path)
        os.waitpid(pid, 0)
        deadline = time.monotonic() + PATIENCE_S  # a command may still be on its way
        while not os.path.lexists(marker) and time.monotonic() < deadline:
            time.sleep(0.01)
        fired = time.perf_counter() - started if os.path.lexists(marker) else None
        print(json.dumps(fired), flush=True)


def _open_unsafely(path: Path) -> None:
    """Never returns."""
    import torch

    try:
        signal.alarm(LIMIT_S)
        quiet = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(quiet, descriptor)
        os.chdir(path.parent)
        with path.open("rb") as file:  # torch goes by the ending of a path
            pickle.load(file) if path.name.startswith("plain") else torch.load(file, weights_only=False)
    finally:
        time.sleep(0.05)  # for a thread that the payload started
        os._exit(0)


if __name__ == "__main__":
    main()
