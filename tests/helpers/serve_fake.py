"""The real web app around runs that train nothing: `python serve_fake.py DATA PORT`; see fake_run.py."""

import os
import sys
from pathlib import Path

from places import ROOT

sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]

from compress.errors import DataError  # noqa: E402
from compress.jobs import Queue  # noqa: E402
from compress.request import Request  # noqa: E402
from compress.ui.backend import Offer  # noqa: E402
from compress.ui.estimates import Structure  # noqa: E402
from compress.ui.web.settings import Settings, prepare_environment  # noqa: E402

MODELS = ("mobilenet_v2", "resnet101", "resnet152", "resnet18", "resnet34", "resnet50")


def fake_command(folder: Path, resume: bool) -> list[str]:
    fake = Path(__file__).with_name(os.environ.get("ESPALIER_FAKE", "fake_run.py"))
    return [
        sys.executable,
        *(["-S"] if fake.name == "fake_run.py" else ["-P"]),
        str(fake),
        str(folder),
        str(folder / "request.json"),
        *(["--resume"] if resume else []),
    ]


def fake_check(request: Request) -> dict[str, object]:
    return {
        "possible": True,
        "text": f"{request.model} can be compressed as asked.",
        "groups": [
            {"layers": ["layer1.0.conv1"], "channels_before": 64, "channels_after": 32, "reason": "feeds <one> layer"}
        ],
        "left_out": [{"layer": "fc", "reason": "it is the output"}],
        "runtimes": [{"runtime": "onnxruntime", "text": "runs here"}],
    }


SEEN = "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAEUlEQVR4nGMIW1yKFTEMLQkAuRVbgVPuSTAAAAAASUVORK5CYII="
"""A PNG of one colour."""


def fake_classify(folder: Path, image: Path) -> dict[str, object]:
    if image.read_bytes().startswith(b"no image"):
        raise DataError("This image cannot be used (not a JPEG, PNG, WebP or BMP image): choose another.")
    rows = [{"class": "Shirt & <top>", "share": 0.75}, {"class": "Bag", "share": 0.25}]
    models = [
        {"file": "baseline.onnx", "runtime": "openvino", "precision": "fp32", "ms": 1.7, "top": rows},
        {
            "file": "quantized.onnxruntime.onnx",
            "runtime": "openvino",
            "precision": "int8",
            "ms": 0.14,
            "top": rows[::-1],
        },
    ]
    return {"input_size": 32, "seen": SEEN, "repeats": 15, "models": models}


def fake_count(structure: Structure) -> dict[str, object]:
    """As if every layer shrank."""
    rows = {
        str(percent): {
            "parameters": round(11_181_642 * (1 - percent / 100) ** 2),
            "macs": round(37_000_000 * (1 - percent / 100) ** 2),
            "groups": [[0, 64, 64 - round(0.64 * percent), 1]],
            "left_out": [[2, 3]],
        }
        for percent in range(1, 100)
    }
    words = ["layer1.0.conv1 layer1.0.conv2", "their <outputs> are added", "fc", "gives the answer"]
    return {"parameters": 11_181_642, "macs": 37_000_000, "rows": rows, "words": words}


def main() -> None:
    settings = Settings.from_environment({**os.environ, "ESPALIER_DATA": sys.argv[1], "ESPALIER_PORT": sys.argv[2]})
    prepare_environment(os.environ, settings)
    from example_report import example_report

    from compress.ui.web.server import build_app, listen

    with Queue(settings.data_dir, command=fake_command, read_only_when_damaged=True, **settings.queue_limits) as queue:
        (queue.data_dir / "example-report.json").write_text(example_report().to_json())
        app = build_app(
            settings,
            queue,
            check=fake_check,
            classify=fake_classify,
            count=fake_count,
            models=[Offer(name, 11_689_512) for name in MODELS],
        )
        listen(app, settings)


if __name__ == "__main__":
    main()
