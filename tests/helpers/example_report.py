"""A report with every part filled, for tests that show one. Its numbers are made up."""

from __future__ import annotations

import math

from compress.report import (
    CrossCheck,
    Data,
    Engine,
    Environment,
    Epoch,
    Handoff,
    Hop,
    Layer,
    Loss,
    Measurement,
    MixedStep,
    Report,
    Stage,
    Variant,
    Verdict,
    Worth,
)
from compress.request import Request
from compress.runs import STAGES

NOTE = "The class <b>Shirt & top</b> has few images."


def example_report() -> Report:
    variants = (
        _variant("baseline", None, 11_181_642, 37_000_000, 44_800_000, 0.912),
        _variant("pruned", "baseline", 2_797_610, 9_500_000, 11_200_000, 0.909),
        _variant("quantized", "pruned", 2_797_610, 9_500_000, 2_900_000, 0.907),
    )
    return Report(
        espalier_version="0.1.0",
        created="2026-11-22T12:00:00+00:00",
        request=Request().model_dump(mode="json"),
        checkpoint="the bundled checkpoint",
        architecture="resnet18",
        seed=0,
        environment=Environment(
            cpu="Example CPU", cpu_features=("avx2",), cores=2, gpu=None, threads=1, versions={"torch": "2.14.1"}
        ),
        data=Data(
            source="fashion-mnist",
            kind="labelled",
            n_train=6000,
            n_test=2000,
            class_names=("Shirt & top", "Bag"),
            input_size=32,
            mean=(0.5,) * 3,
            std=(0.5,) * 3,
            notes=(),
        ),
        variants=variants,
        handoffs=(
            Handoff(
                source="masked",
                target="shrunk",
                check="same images",
                max_abs_diff=1e-6,
                reference_scale=9.0,
                top1_agreement=1.0,
                n_images=64,
                tolerance="1e-4",
                passed=True,
            ),
        ),
        ledger=tuple(
            Hop(
                name=name,
                through=through,
                accuracy=accuracy,
                accuracy_ci95=(accuracy - 0.012, accuracy + 0.012),
                previous=previous,
                agreement_with_previous=agreement,
                lost=lost,
                gained=gained,
                n=2000,
            )
            for name, through, accuracy, previous, agreement, lost, gained in (
                ("baseline", "torch", 0.912, None, None, None, None),
                ("pruned", "torch", 0.909, "baseline, torch", 0.97, 33, 27),
                ("quantized.onnxruntime.onnx", "openvino", 0.907, "pruned, torch", 0.98, 22, 18),
            )
        ),
        loss=Loss(
            text="Most was lost at pruned (torch): 33 of 2,000 answers turned wrong there and 27 right (0.3 points); its "
            "worst layer is layer1.0.conv1, whose output is 12 % off the original's.",
            hop="pruned",
            through="torch",
            layer="layer1.0.conv1",
        ),
        cross_checks=(
            CrossCheck(
                file="quantized.onnxruntime.onnx",
                first="onnxruntime",
                second="openvino",
                n=2000,
                different=120,
                accuracy_difference_points=-5.8,
                agrees=False,
                text="quantized.onnxruntime.onnx <on two runtimes> gets 120 different answers.",
            ),
        ),
        mixed_precision=(
            MixedStep(widened=(), accuracy=0.81, weight_bits=4.0),
            MixedStep(widened=("layer1.0.conv1", "layer1.0.conv2"), accuracy=0.9, weight_bits=4.3),
        ),
        worth=(
            Worth(
                runtime="openvino",
                variant="pruned",
                text="On openvino int8 is worth it: 0.14 ms against 0.30 ms in bf16 of the same structure, 2.1x as fast.",
                fp32_ms=0.6,
                half_precision="bf16",
                half_ms=0.3,
                int8_ms=0.14,
                speedup=2.14,
                float_layers=(),
                conversions=None,
                layer_bits={},
                excluded_ms=None,
            ),
        ),
        measurements=tuple(
            _measurement(*row)
            for row in (
                ("baseline", "onnxruntime", "fp32", 2.1),
                ("baseline", "openvino", "fp32", 1.7),
                ("pruned", "openvino", "fp32", 0.6),
                ("quantized", "openvino", "int8", 0.14),
            )
        ),
        engines=(
            Engine(
                runtime="tensorrt-rtx",
                variant="quantized",
                file=None,
                ran=False,
                text="built, not run",
                layer_precisions={},
            ),
        ),
        stages=tuple(Stage(name=name, seconds=2.0, peak_rss_bytes=10**9, skipped=None) for name in STAGES),
        layers=tuple(
            Layer(
                name=f"layer{number}.0.conv1",
                type="Conv2d",
                channels_before=64 * number,
                channels_after=32 * number,
                macs_before=10**6,
                macs_after=10**6 // 4,
                weight_bits=8,
                sqnr_db=38.0,
                output_sqnr_db=35.0 - number,
                file_sqnr_db={"quantized.onnxruntime.onnx": 90.0},
                group="a",
                reason="feeds the same <sum>",
                pruned_error=0.2,
                refitted_error=0.001,
            )
            for number in range(1, 9)
        ),
        curves=tuple(
            Epoch(
                stage=stage,
                epoch=epoch,
                train_loss=0.5 / epoch,
                learning_rate=0.01,
                seconds=9.0,
                accuracy=0.88 + 0.01 * epoch,
            )
            for stage, epoch in (("finetune", 1), ("finetune", 2), ("quantize", 1))
        ),
        notes=(NOTE,),
        verdict=Verdict(
            text="resnet18 runs 12.1x faster from a 15.4x smaller file and loses 0.5 points of accuracy.",
            runtime="openvino",
            speedup_vs_fastest_fp32=12.1,
            size_ratio=15.4,
            accuracy_drop_points=0.5,
        ),
    )


def _variant(name: str, parent: str | None, parameters: int, macs: int, size: int, accuracy: float) -> Variant:
    return Variant(
        name=name,
        parent=parent,
        parameters=parameters,
        macs=macs,
        file_bytes={f"{name}.onnx": size},
        accuracy=accuracy,
        accuracy_ci95=(accuracy - 0.012, accuracy + 0.012),
        accuracy_through="torch",
        n_test=2000,
    )


def _measurement(variant: str, runtime: str, precision: str, p50: float) -> Measurement:
    samples = tuple(p50 * (1 + 0.05 * math.sin(number)) for number in range(50))
    return Measurement(
        variant=variant,
        runtime=runtime,
        file=f"{variant}.onnx",
        precision_requested=precision,
        precision=precision,
        integer_layers=21 if precision == "int8" else None,
        candidate_layers=21,
        batch_size=1,
        threads=1,
        input_size=32,
        samples_ms=samples,
        p50_ms=p50,
        p90_ms=p50 * 1.04,
        p99_ms=p50 * 1.05,
        throughput_per_s=1000 / p50,
        noisy=False,
        accuracy=None,
        accuracy_ci95=None,
        notes=(),
    )
