"""A float or fake-quantized torch model as an ONNX file, which every peer's user writes in some form."""

import torch


def export(model, example, path, dynamo=True):
    shapes = {"dynamic_shapes": ({0: torch.export.Dim("batch", min=1, max=4096)},)}
    axes = {"dynamic_axes": {"images": {0: "batch"}, "logits": {0: "batch"}}}
    torch.onnx.export(
        model,
        (example.repeat(2, 1, 1, 1),),
        str(path),
        input_names=["images"],
        output_names=["logits"],
        dynamo=dynamo,
        **(shapes | {"external_data": False} if dynamo else axes),
    )
