"""What handing a run to a Ray cluster costs: `python -m bench.cluster HOST:PORT`, on a machine that is one of its nodes.

The run itself does nothing (`true`), so the whole time is overhead. Two ways of handing in are timed in turn with a child
process of this machine: with a process that connects for this run alone, as the queue does, and over a connection that is kept, as a
search over many trials would.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from compress import signing
from compress.jobs import ray
from compress.request import Request

ROUNDS = 5
CHILD = """
import sys
from pathlib import Path
from bench.cluster import over
from compress import cluster
with cluster.connected(cluster.Cluster(sys.argv[1])) as connection:
    over(connection, Path(sys.argv[2]))
"""


def nothing(folder: Path, resume: bool) -> list[str]:
    """The words of a run that is over at once."""
    return ["true"]


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def over(connection: ray.Connection, folder: Path) -> None:
    attempt = connection.submit(folder, nothing)
    while (ended := attempt.ended()) is None:
        time.sleep(0.01)
    if ended.returncode != 0:
        sys.exit(ended.console)


def main() -> None:
    address = sys.argv[1]
    signing.prepare()
    seconds: dict[str, list[float]] = {"child": [], "connection of its own": [], "connection kept": []}
    with tempfile.TemporaryDirectory() as place, ray.connected(ray.Cluster(address)) as connection:
        folder = Path(place)
        (folder / "request.json").write_text(Request().to_json())
        over(connection, folder)  # the first one starts the worker
        for _ in range(ROUNDS):
            seconds["child"].append(timed(lambda: subprocess.run(["true"], check=True)))
            own = [sys.executable, "-c", CHILD, address, place]
            seconds["connection of its own"].append(timed(lambda own=own: subprocess.run(own, check=True)))
            seconds["connection kept"].append(timed(lambda: over(connection, folder)))
    print(json.dumps({way: {"median_s": statistics.median(all_), "all_s": all_} for way, all_ in seconds.items()}))


if __name__ == "__main__":
    main()
