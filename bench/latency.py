"""Speed at 224 pixels: 50 % sparsity and 8 bits against the fastest real fp32 of the dense model, in the same run.

    python -m bench.latency [--models resnet18 resnet50 mobilenet_v2] [--out runs/bench-latency]

Weights are random and ranges come from synthetic images: latency does not depend on either. Prints one row per model,
with the seconds that everything outside training took.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import compress
from compress.report.tables import fastest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50", "mobilenet_v2"])
    parser.add_argument("--out", type=Path, default=Path("runs") / f"bench-latency-{time.strftime('%Y%m%d-%H%M%S')}")
    options = parser.parse_args()
    print(
        "model          dense fp32 ms  pruned fp32 ms  int8 ms  runtime      over fastest fp32  "
        "seconds outside training and timing"
    )
    for name in options.models:
        request = compress.Request(model=name, checkpoint="random", data="none", batch_size=8, calibration_images=64)
        report = compress.run(request, out=options.out / name)
        dense, pruned = (fastest(report, variant, precision="fp32") for variant in ("baseline", "pruned"))
        best = fastest(report, "quantized")
        assert dense and pruned and best, "every variant was measured"
        outside = sum(
            stage.seconds for stage in report.stages if stage.name in ("prune", "quantize", "export", "build")
        )
        print(
            f"{name:<14} {dense.p50_ms:>13.2f} {pruned.p50_ms:>15.2f} {best.p50_ms:>8.2f}  {best.runtime:<12} "
            f"{dense.p50_ms / best.p50_ms:>16.1f}x {outside:>8.1f}",
            flush=True,
        )
    print(f"one thread, batch 1, 224 x 224, {report.environment.cpu} ({', '.join(report.environment.cpu_features)})")


if __name__ == "__main__":
    main()
