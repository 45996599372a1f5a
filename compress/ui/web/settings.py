"""The settings of the server, read from the environment once, before Gradio is imported."""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compress.errors import RequestError
from compress.jobs import DATA_DIR
from compress.jobs.ray import ENVIRONMENT, Cluster, cluster_command
from compress.jobs.retention import Limits

LOOPBACK = ("127.0.0.1", "localhost", "::1")
LEAST_PASSWORD = 8
"""Characters."""


@dataclass(frozen=True)
class Settings:
    """One field for each ESPALIER_ variable; docs/web-app.md lists them by these docstrings."""

    data: Path = DATA_DIR
    """ESPALIER_DATA: folder of the queue, the runs and the uploads."""
    host: str = "127.0.0.1"
    """ESPALIER_HOST: address to listen on; 0.0.0.0 in a container."""
    port: int = 7860
    """ESPALIER_PORT"""
    at_once: int = 1
    """ESPALIER_RUNS_AT_ONCE: runs executed concurrently; use one per device."""
    max_queued: int = 20
    """ESPALIER_MAX_QUEUED: maximum number of queued runs."""
    max_per_visitor: int | None = None
    """ESPALIER_MAX_PER_VISITOR: maximum number of queued and active runs of one visitor; default: no limit.
    A visitor is a login name, or else an address; behind a proxy set FORWARDED_ALLOW_IPS, or all share the proxy's address."""
    run_limit_min: int | None = None
    """ESPALIER_RUN_LIMIT_MIN: time limit of a run, in minutes; a stopped run can be resumed. Default: no limit."""
    max_upload_mb: int = 2048
    """ESPALIER_MAX_UPLOAD_MB: largest uploaded file."""
    requests_per_min: int = 1200
    """ESPALIER_REQUESTS_PER_MIN: maximum per address; a page that shows a run sends about 60, opening it about 140."""
    uploads_per_hour: int = 120
    """ESPALIER_UPLOADS_PER_HOUR: maximum per address."""
    keep_days: int | None = None
    """ESPALIER_KEEP_DAYS: days after its end at which a run is deleted, unless `compress jobs keep` keeps it. Default: never."""
    max_disk_gb: int | None = None
    """ESPALIER_MAX_DISK_GB: disk quota of all runs; the oldest ended runs that are not kept are deleted. Default: no limit."""
    list_runs: bool | None = None
    """ESPALIER_LIST_RUNS: 1 shows every run to every visitor, 0 only those started in the same browser.
    Default: 1 on a loopback address, else 0, because the secrecy of its link is all that protects a run."""
    cluster: str | None = None
    """ESPALIER_CLUSTER: HOST:PORT of a Ray cluster that executes the runs; default: this machine."""
    cluster_cpus: int = 1
    """ESPALIER_CLUSTER_CPUS: CPUs reserved for each run."""
    cluster_gpus: float = 0.0
    """ESPALIER_CLUSTER_GPUS: GPUs reserved for each run, a fraction of one or a whole number."""
    allowed_hosts: tuple[str, ...] = ()
    """ESPALIER_ALLOWED_HOSTS: host names, separated by commas, under which a proxy serves the app.
    Other Host headers are refused; on a non-loopback address, numeric addresses are accepted if this is empty."""
    accounts: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    """ESPALIER_LOGIN: `name:password`, several separated by spaces; see `compress.ui.web.login`. Default: no login."""
    mcp: bool = False
    """ESPALIER_MCP: 1 offers the endpoints as tools of the Model Context Protocol."""

    @property
    def data_dir(self) -> Path:
        return self.data.expanduser().resolve()

    @property
    def queue_limits(self) -> dict[str, Any]:
        """The limits and the cluster of the queue, as arguments of `compress.jobs.Queue`."""
        where: dict[str, Any] = {}
        if self.cluster is not None:
            try:
                cluster = Cluster(self.cluster, self.cluster_cpus, self.cluster_gpus)
            except RequestError as error:
                raise RequestError(
                    f"ESPALIER_{error.field.upper().replace('-', '_')}", error.got, error.allowed
                ) from None
            where = {"command": cluster_command(cluster), "passes": ENVIRONMENT}
        return where | {
            "at_once": self.at_once,
            "max_queued": self.max_queued,
            "max_per_owner": self.max_per_visitor,
            "keeping": Limits(self.keep_days, None if self.max_disk_gb is None else self.max_disk_gb * 10**9),
            "max_seconds": None if self.run_limit_min is None else 60 * self.run_limit_min,
        }

    @property
    def uploads(self) -> Path:
        """Folder of the uploads that no run has copied yet."""
        return self.data_dir / "incoming"

    @property
    def local(self) -> bool:
        """Whether only this machine reaches the server: it listens on loopback, and no proxy serves it under another name."""
        return self.host in LOOPBACK and not self.allowed_hosts

    @property
    def trusts_visitors(self) -> bool:
        """Whether every visitor may change every run: only this machine reaches the server, and there is no login."""
        return self.local and not self.accounts

    @property
    def lists_all_runs(self) -> bool:
        return self.local if self.list_runs is None else self.list_runs

    @property
    def hosts(self) -> tuple[str, ...]:
        """Accepted host names."""
        return tuple(dict.fromkeys((*LOOPBACK, self.host, *self.allowed_hosts)))

    @property
    def answers_to_addresses(self) -> bool:
        """Whether every numeric address is accepted as Host: DNS rebinding needs a name, so addresses are safe."""
        return self.host not in LOOPBACK and not self.allowed_hosts

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Settings:
        """Raises `RequestError` for a variable with an invalid value."""
        readers: dict[str, tuple[str, Any]] = {
            "ESPALIER_DATA": ("data", Path),
            "ESPALIER_HOST": ("host", str),
            "ESPALIER_PORT": ("port", _number(1, 65535)),
            "ESPALIER_RUNS_AT_ONCE": ("at_once", _number(1, 64)),
            "ESPALIER_MAX_QUEUED": ("max_queued", _number(1, 1000)),
            "ESPALIER_MAX_PER_VISITOR": ("max_per_visitor", _number(1, 1000)),
            "ESPALIER_RUN_LIMIT_MIN": ("run_limit_min", _number(1, 100_000)),
            "ESPALIER_MAX_UPLOAD_MB": ("max_upload_mb", _number(1, 1_000_000)),
            "ESPALIER_REQUESTS_PER_MIN": ("requests_per_min", _number(10, 1_000_000)),
            "ESPALIER_UPLOADS_PER_HOUR": ("uploads_per_hour", _number(1, 1_000_000)),
            "ESPALIER_KEEP_DAYS": ("keep_days", _number(1, 100_000)),
            "ESPALIER_MAX_DISK_GB": ("max_disk_gb", _number(1, 1_000_000)),
            "ESPALIER_LIST_RUNS": ("list_runs", _switch),
            "ESPALIER_CLUSTER": ("cluster", str),
            "ESPALIER_CLUSTER_CPUS": ("cluster_cpus", _number(1, 1024)),
            "ESPALIER_CLUSTER_GPUS": ("cluster_gpus", _share),
            "ESPALIER_ALLOWED_HOSTS": ("allowed_hosts", _names),
            "ESPALIER_LOGIN": ("accounts", _accounts),
            "ESPALIER_MCP": ("mcp", _switch),
        }
        values = {}
        for variable, (name, read) in readers.items():
            if environ.get(variable, "") != "":
                values[name] = read(variable, environ[variable]) if read not in (Path, str) else read(environ[variable])
        if environ.get("SPACE_HOST"):  # the name of a Space on the Hugging Face Hub
            values["allowed_hosts"] = (*values.get("allowed_hosts", ()), environ["SPACE_HOST"])
        settings = cls(**values)
        if settings.mcp:
            _refuse_without_mcp(settings)
        return settings


def prepare_environment(environ: MutableMapping[str, str], settings: Settings) -> None:
    """Switches off telemetry, update checks and sharing, and keeps Gradio's files in the data folder.

    Has to come before `import gradio`, which reads these variables while it is imported.
    """
    environ.update(
        {
            "GRADIO_ANALYTICS_ENABLED": "False",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "DO_NOT_TRACK": "1",
            "GRADIO_SHARE": "False",
            "GRADIO_SSR_MODE": "False",
            "GRADIO_RUN_HISTORY": "False",
            "GRADIO_MCP_SERVER": "False",
            "GRADIO_TEMP_DIR": str(settings.data_dir / "gradio"),  # files that Gradio would take; none are ever there
        }
    )


def _refuse_without_mcp(settings: Settings) -> None:
    if settings.accounts:
        allowed = (
            "no ESPALIER_LOGIN beside it, because Gradio's tools call the app without a login: put a proxy that asks for one "
            "in front"
        )
        raise RequestError("ESPALIER_MCP", "1", allowed)
    if find_spec("mcp") is None:
        allowed = "the package mcp to be installed first: python -m pip install -r requirements-mcp.txt"
        raise RequestError("ESPALIER_MCP", "1", allowed)


def _number(low: int, high: int) -> Any:
    def read(variable: str, text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise RequestError(variable, text, f"a whole number from {low} to {high}")
        return int(text)

    return read


def _share(variable: str, text: str) -> float:
    if not re.fullmatch(r"[0-9]+|0?\.[0-9]+|1\.0", text):
        raise RequestError(variable, text, "a number from 0 to 1, or a whole number")
    return float(text)


def _switch(variable: str, text: str) -> bool:
    if text not in ("0", "1"):
        raise RequestError(variable, text, "0 or 1")
    return text == "1"


def _names(variable: str, text: str) -> tuple[str, ...]:
    return tuple(name.strip().lower() for name in text.split(",") if name.strip())


def _accounts(variable: str, text: str) -> tuple[tuple[str, str], ...]:
    accounts = [item.partition(":")[::2] for item in text.split()]
    if not accounts or any(not name or len(password) < LEAST_PASSWORD for name, password in accounts):
        allowed = (
            f"name:password, with at least {LEAST_PASSWORD} characters in the password and several separated by spaces"
        )
        raise RequestError(variable, "something that is not shown here", allowed)
    return tuple(accounts)
