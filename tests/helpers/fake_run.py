"""Stands in for `python -m compress run` where only the queue and the web app are tested: same files, no training.

The model of the request chooses what happens: resnet18 succeeds, resnet34 works until it is told to stop, resnet50 is
refused with a sentence, resnet152 before its first stage, resnet101 dies without a word, mobilenet_v2 ignores SIGTERM
and has a child of its own.
"""

import hashlib
import hmac
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

STAGES = ("baseline", "prune", "finetune", "quantize", "export", "build", "measure", "report")
FOLDER = Path(sys.argv[1])
RESUMED = "--resume" in sys.argv
REPORT = FOLDER.parents[1] / "example-report.json"


def record(**event):
    with (FOLDER / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": time.time(), **event}) + "\n")


def progress(stage, fraction, message, seconds_left=None):
    record(
        stage=stage, index=STAGES.index(stage) + 1, of=8, fraction=fraction, message=message, seconds_left=seconds_left
    )
    with (FOLDER / "log.txt").open("a") as file:
        file.write(f"{stage}: {message}\n")


def signed(kind, document):
    """As compress.signing does it, written out once more."""
    key = Path(os.environ["ESPALIER_SIGNING_KEY"]).read_bytes()
    text = json.dumps([kind, document], sort_keys=True, separators=(",", ":"))
    name = hashlib.sha256(b"espalier key " + key).hexdigest()[:16]
    value = hmac.new(key, text.encode(), "sha256").hexdigest()
    return document | {"signature": {"algorithm": "HMAC-SHA256", "key": name, "value": value}}


def finish():
    artifacts = FOLDER / "artifacts"
    artifacts.mkdir(exist_ok=True)
    (artifacts / "quantized.onnxruntime.onnx").write_bytes(b"onnx " * 1000)
    (artifacts / "<img src=x onerror=alert(1)> & odd.txt").write_text("a name that is not HTML")
    (FOLDER / "report.json").write_text(REPORT.read_text() if REPORT.exists() else "{}")
    files = {}
    for path in sorted(p for p in FOLDER.rglob("*") if p.is_file()):
        name = str(path.relative_to(FOLDER))
        if not name.startswith(("uploads", "events", "log")):
            files[name] = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
    (FOLDER / "manifest.json").write_text(json.dumps(signed("manifest.json", {"format": 1, "files": files})))
    record(state="done", error=None)


def told_to_stop(*_):
    record(state="cancelled", error=None)
    sys.exit(143)


def main():
    request = json.loads((FOLDER / "request.json").read_text())
    model, pace = request["model"], float(request["learning_rate"])
    (FOLDER / "environ.json").write_text(json.dumps(dict(os.environ)))
    signal.signal(signal.SIGTERM, told_to_stop)
    if model == "mobilenet_v2" and not RESUMED:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        grandchild = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
        (FOLDER / "grandchild").write_text(str(grandchild.pid))
    if model == "resnet152":
        sys.stderr.write("Traceback of interest\nError: The runtime tensorrt is not installed here: choose another.\n")
        sys.exit(1)
    for number, stage in enumerate(STAGES):
        progress(stage, 0.0, "started")
        if stage == "finetune" and not RESUMED:
            if model == "resnet50":
                record(
                    state="failed",
                    error="The loss is not a number in epoch 1: choose a smaller learning_rate than <b>0.04</b>.",
                )
                sys.exit(1)
            if model == "resnet101":
                os.kill(os.getpid(), signal.SIGKILL)
            while model in ("resnet34", "mobilenet_v2"):
                progress(stage, 0.42, "epoch 1 of 2, loss 0.31", 75.0)
                time.sleep(0.2)
        time.sleep(pace)
        progress(stage, 1.0, f"done in {number}.0 s")
    finish()


main()
