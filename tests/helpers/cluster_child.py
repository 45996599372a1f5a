"""What a queue starts when its runs work on a cluster, with runs that train nothing: `python cluster_child.py ADDRESS CPUS
GPUS COMMAND FOLDER [--resume]`, where COMMAND is the function of queues.py that the node gets its words from."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import NoReturn

import queues

from compress.errors import CompressError
from compress.jobs.ray import Cluster, run_on
from compress.request import Request


def stop(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> None:
    signal.signal(signal.SIGTERM, stop)
    address, cpus, gpus, command, folder = sys.argv[1:6]
    request = Request.from_file(Path(folder) / "request.json")
    try:
        run_on(
            Cluster(address, int(cpus), float(gpus)),
            request,
            out=Path(folder),
            resume="--resume" in sys.argv,
            command=getattr(queues, command),
        )
    except CompressError as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit(143)


if __name__ == "__main__":
    main()
