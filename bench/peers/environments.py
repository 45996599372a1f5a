"""An environment for each peer. torch is installed once for all of them: it is 5.5 GB."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from compress.files import write_text

REQUIREMENTS = Path(__file__).parent / "requirements"
SHARED = "torch"
"""Every environment sees what is in this one, and may shadow it with versions of its own."""
READY = "ready.json"
AFTERWARDS = {
    "nncf": "import nncf.torch.quantization.extensions as _; import nncf; nncf.torch.force_build_cpu_extensions()"
}
"""What a peer does once, at its first use, which is not part of compressing a model; NNCF compiles its kernels."""


class PeerError(Exception):
    """A peer cannot be installed, or its script failed; the text is the reason as the table gives it."""


def required(name: str) -> str:
    """What an environment is made from: its own pins, and those of the environment that it sees."""
    names = [name] if name == SHARED else [name, SHARED]
    return "".join((REQUIREMENTS / f"{one}.txt").read_text(encoding="utf-8") for one in names)


def prepare(name: str, folder: Path) -> Path:
    """The interpreter of the environment `name` below `folder`, which is made when it is not there as required.

    Raises:
        PeerError: pip refuses; its last lines are the reason.
    """
    wanted = required(name)
    home = folder / name
    python, ready = home / "venv" / "bin" / "python", home / READY
    if ready.is_file() and json.loads(ready.read_text(encoding="utf-8"))["requirements"] == wanted:
        return python
    _call([sys.executable, "-m", "venv", "--clear", str(home / "venv")])
    if name != SHARED:
        shared = _site_packages(prepare(SHARED, folder))
        (_site_packages(python) / "torch-of-all.pth").write_text(f"{shared}\n", encoding="utf-8")
    _call([str(python), "-m", "pip", "install", "--quiet", "-r", str(REQUIREMENTS / f"{name}.txt")])
    if name in AFTERWARDS:
        _call([str(python), "-c", AFTERWARDS[name]], variables(python))
    listed = json.loads(_call([str(python), "-m", "pip", "list", "--format", "json"]))
    versions = {package["name"]: package["version"] for package in listed}
    write_text(ready, json.dumps({"requirements": wanted, "versions": versions}, indent=1) + "\n")
    return python


def versions(name: str, folder: Path) -> dict[str, str]:
    """What a prepared environment holds: package -> version."""
    return json.loads((folder / name / READY).read_text(encoding="utf-8"))["versions"]


def megabytes(name: str, folder: Path) -> float:
    """Size of the environment on the disk, without the torch of all."""
    return sum(path.stat().st_size for path in (folder / name).rglob("*") if path.is_file()) / 1e6


def reason(text: str) -> str:
    """The end of a program's output from its last line that is not indented, which for Python is the exception."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("WARNING")]
    starts = [number for number, line in enumerate(lines) if not line[0].isspace()]
    last = lines[starts[-1] :] if starts else []
    return " ".join(line.strip() for line in last)[:300] or "it ended without a word"


def _site_packages(python: Path) -> Path:
    return next((python.parents[1] / "lib").glob("python3.*")).resolve() / "site-packages"


def variables(python: Path) -> dict[str, str]:
    """The environment variables of a peer's programs: its own ninja is found, and what it compiles stays with it.

    NNCF gives its compiler a minute unless told to wait.
    """
    own = {
        "PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "TORCH_EXTENSIONS_DIR": str(python.parents[2] / "extensions"),
        "NNCF_EXTENSION_LOAD_TIMEOUT": "0",
    }
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | own


def _call(command: list[str], environment: dict[str, str] | None = None) -> str:
    """What a command prints. Raises `PeerError`."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise PeerError(reason(done.stderr or done.stdout))
    return done.stdout
