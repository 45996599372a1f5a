"""A file cut out of the dense one is the file that the structure itself would be exported to, but for the values."""

import onnx
import pytest
import torch
from torch import nn

from compress import onnx_export, pruning, quantization
from compress.search.onnx_surgery import CannotCutError, cut

SIZE = 16


class Residual(nn.Module):
    """A stem, a depthwise block with a shortcut, and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.wide = nn.Conv2d(16, 32, 1)
        self.deep = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.narrow = nn.Conv2d(32, 16, 1)
        self.head = nn.Linear(16, 4)

    def forward(self, images):
        read = torch.relu(self.norm(self.stem(images)))
        read = read + self.narrow(torch.relu(self.deep(torch.relu(self.wide(read)))))
        return self.head(torch.flatten(nn.functional.adaptive_avg_pool2d(read, 1), 1))


def made(precision):
    """The dense and the shrunk model, and what writes the file of each."""
    torch.manual_seed(0)
    dense = Residual().eval()
    nn.init.normal_(dense.norm.bias)
    example = torch.rand(1, 3, SIZE, SIZE)
    plan = pruning.plan(dense, example, sparsity=0.5)
    shrunk = pruning.prune(dense, example, plan, "l1-norm").model.eval()

    def export(model, path):
        if precision == "fp32":
            return onnx_export.export(model, path, input_size=SIZE)
        prepared = quantization.prepare(model)
        bits = quantization.assign_bits(prepared, 8, 8)
        found = quantization.quantize(
            prepared, bits, quantizer="ptq", calibration=[torch.rand(8, 3, SIZE, SIZE)], train=None
        )
        return onnx_export.export_flavours(found, {"onnxruntime": path}, input_size=SIZE)

    return dense, shrunk, export


def described(path):
    graph = onnx.load(path).graph
    nodes = [(n.op_type, n.name, [a.i for a in n.attribute if a.name == "group"]) for n in graph.node]
    return nodes, {c.name: (tuple(c.dims), c.data_type) for c in graph.initializer}


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_cut_file_is_the_exported_one_but_for_its_values(precision, tmp_path):
    dense, shrunk, export = made(precision)
    export(dense, tmp_path / "dense.onnx")
    export(shrunk, tmp_path / "shrunk.onnx")
    cut(tmp_path / "dense.onnx", dense, shrunk, tmp_path / "cut.onnx")
    assert described(tmp_path / "cut.onnx") == described(tmp_path / "shrunk.onnx")
    assert described(tmp_path / "cut.onnx") != described(tmp_path / "dense.onnx")
    onnx.checker.check_model(str(tmp_path / "cut.onnx"), full_check=True)


def test_a_constant_that_belongs_to_no_layer_is_not_guessed_at(tmp_path):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 16, 1)
            self.factor = nn.Parameter(torch.rand(1, 16, 1, 1))

        def forward(self, images):
            return (self.conv(images) * self.factor).mean((2, 3))

    onnx_export.export(Scaled().eval(), tmp_path / "dense.onnx", input_size=SIZE)
    with pytest.raises(CannotCutError):
        cut(tmp_path / "dense.onnx", Scaled(), Scaled(), tmp_path / "cut.onnx")
