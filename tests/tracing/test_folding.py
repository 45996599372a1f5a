"""BatchNorm folded into the layer before it."""

import pytest
import torch
from torch import nn
from torchvision import models

from compress import onnx_export
from compress.errors import HandoffError
from compress.tracing.folding import folded


def _with_statistics(model):
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.track_running_stats:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


def _norms(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "googlenet"])
def test_a_folded_model_answers_as_before_and_the_original_stays_as_it_was(name):
    model = _with_statistics(models.get_model(name, weights=None))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = torch.randn(2, 3, 64, 64)
    smaller, proof = folded(model, images)
    assert proof.passed
    with torch.no_grad():
        expected, got = model(images), smaller(images)
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
    unused_in_eval_mode = [name for name in _norms(smaller) if not name.startswith("aux")]
    assert unused_in_eval_mode == [] and _norms(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Odd(nn.Module):
    """Layers whose BatchNorm must stay: read twice, called twice, without statistics, not behind a layer."""

    def __init__(self):
        super().__init__()
        self.twice_read, self.norm_a = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.twice_called, self.norm_b = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.bare, self.norm_c = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)
        self.norm_first = nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.twice_read(x)
        x = x + self.norm_a(x)
        x = self.norm_b(self.twice_called(self.twice_called(x)))
        return self.norm_first(torch.relu(self.norm_c(self.bare(x)))).mean((2, 3))


def test_a_batch_norm_that_others_depend_on_stays():
    model = _with_statistics(Odd())
    images = torch.randn(2, 3, 8, 8)
    smaller, _ = folded(model, images)
    assert _norms(smaller) == _norms(model)
    torch.testing.assert_close(smaller(images), model(images))


def test_a_model_that_cannot_be_traced_is_exported_as_it_is():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(self.conv(x)) if x.sum() > 0 else x

    model = Branches().eval()
    assert folded(model, torch.randn(2, 3, 8, 8)) == (model, None)


def test_an_exported_file_names_the_layers_that_batch_norm_was_folded_into(tmp_path):
    onnx = pytest.importorskip("onnx")
    model = _with_statistics(models.resnet18())
    onnx_export.export(model, tmp_path / "model.onnx", input_size=32)
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert "layer1.0.conv1" in {node.name for node in graph.node}
    assert "BatchNormalization" not in {node.op_type for node in graph.node}


class Entangled(nn.Module):
    """Pairs that must stay: called by another name, hooked, and read by the model itself."""

    def __init__(self):
        super().__init__()
        self.a, self.norm_a, self.b, self.norm_b, self.c, self.norm_c = (
            part for i in (3, 4, 4) for part in (nn.Conv2d(i, 4, 1), nn.BatchNorm2d(4))
        )
        self.again = self.a
        self.norm_b.register_forward_hook(lambda _, __, output: output * 2)

    def forward(self, x):
        x = self.norm_b(self.b(self.norm_a(self.again(x))))
        return self.norm_c(self.c(x)).mean((2, 3)) * self.norm_c.weight


def test_a_batch_norm_that_is_known_by_other_ways_stays():
    model = _with_statistics(Entangled())
    smaller, proof = folded(model, torch.randn(4, 3, 8, 8))
    assert _norms(smaller) == _norms(model) and proof.passed


def test_a_model_that_asks_its_batch_norm_is_exported_as_it_is():
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(self.conv(x)) * self.norm.num_features

    model = _with_statistics(Asks())
    assert folded(model, torch.randn(2, 3, 8, 8)) == (model, None)


def test_a_fold_that_changes_answers_is_found(monkeypatch):
    class Other(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * 1.001

    monkeypatch.setattr("compress.tracing.folding._fused", lambda *_: Other(3, 4, 1))
    with pytest.raises(HandoffError, match="model, torch and BatchNorm folded, torch answer differently"):
        folded(_with_statistics(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))), torch.randn(2, 3, 8, 8))
