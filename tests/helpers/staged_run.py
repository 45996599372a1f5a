"""Stands in for `python -m compress run` where faults are put in: the real stages, records and manifest, no training.

`python staged_run.py FOLDER REQUEST [--resume]`. The request's seed tells at which moment to wait, see `seed_of`. The rest is
told by files beside the folder of runs, in points/: <id>.reached says that the moment has come; <id>.go lets the run go
on; <id>.done lists the stages that were carried out, in every attempt.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from compress.errors import CompressError
from compress.files import atomic, storage_error
from compress.request import Request
from compress.runs import STAGES, Run, StageResult, open_run

MOMENTS = ("start", "middle", "written", "recorded")
"""Of a stage: before its work, with a file half written, before its record, after it."""
CONTENT = 4096
"""Bytes of a stage's file."""


def seed_of(stage: str, moment: str) -> int:
    """The seed of a request whose run waits there; 0 waits nowhere."""
    return 1 + STAGES.index(stage) * len(MOMENTS) + MOMENTS.index(moment)


@dataclass(frozen=True)
class Staged:
    """One attempt of a run."""

    folder: Path
    request: Request
    resumed: bool

    def carry_out(self) -> str | None:
        """The sentence why it failed; None when it is done."""
        run = None
        try:
            run = open_run(self.folder, self.request, self._notify, resume=self.resumed)
            for stage in STAGES:
                run._execute(stage, (StageResult,), lambda run=run, stage=stage: self._work(run, stage))
            run.finish({})
            return None
        except OSError as error:
            refusal: BaseException = storage_error(Path(error.filename or self.folder), error)
        except (CompressError, KeyboardInterrupt) as error:
            refusal = error
        if run is not None:
            run.end(refusal)
        return str(refusal)

    def _notify(self, event: dict[str, Any]) -> None:
        """The first and the last event of a stage are moments."""
        if event.get("fraction") in (0.0, 1.0):
            self._wait_at(event["stage"], "start" if event["fraction"] == 0.0 else "recorded")

    def _work(self, run: Run, stage: str) -> StageResult:
        """Reads the file of the stage before and leaves one."""
        if self._told("").parent.exists():
            with self._told("done").open("a") as file:
                file.write(f"{stage}\n")
        number = STAGES.index(stage)
        if number > 0:
            expected = bytes([number - 1]) * CONTENT
            assert (run.artifacts / f"{STAGES[number - 1]}.bin").read_bytes() == expected, (
                "the stage before is not whole"
            )
        with atomic(run.artifacts / f"{stage}.bin") as partial, partial.open("wb") as file:
            file.write(bytes([number]) * (CONTENT // 2))
            file.flush()
            self._wait_at(stage, "middle")
            file.write(bytes([number]) * (CONTENT // 2))
        self._wait_at(stage, "written")
        return StageResult(files=(f"artifacts/{stage}.bin",))

    def _wait_at(self, stage: str, moment: str) -> None:
        """Waits with a child of its own, as a run does whose images are decoded by workers, if this is the moment."""
        if self.resumed or self.request.seed != seed_of(stage, moment):
            return
        worker = subprocess.Popen(["sleep", "600"])
        self._told("reached").touch()
        while not self._told("go").exists():
            time.sleep(0.02)
        worker.kill()
        worker.wait()

    def _told(self, what: str) -> Path:
        return self.folder.parent.parent / "points" / f"{self.folder.name}.{what}"


def stop(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> None:
    signal.signal(signal.SIGTERM, stop)
    attempt = Staged(Path(sys.argv[1]), Request.from_file(Path(sys.argv[2])), "--resume" in sys.argv)
    if (why := attempt.carry_out()) is not None:
        sys.exit(f"Error: {why}")


if __name__ == "__main__":
    main()
