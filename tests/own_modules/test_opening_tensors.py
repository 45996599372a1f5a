"""Tensors of a user's module: converted to float32, or refused by name."""

from __future__ import annotations

import pytest
import torch
from opening import opened, refusal
from torch import nn
from user_classifiers import Net, trained_values

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:torch.quantize")


def mixed() -> nn.Module:
    net = trained_values(Net())
    net.head.double()
    net.conv1.half()
    net.shift = torch.full((1,), 0.5, dtype=torch.float64)  # a plain attribute, which Module.float passes over
    return net


@pytest.mark.parametrize(
    ("build", "formats"),
    [
        (lambda: trained_values(Net()).half(), "float16"),
        (lambda: trained_values(Net()).bfloat16(), "bfloat16"),
        (lambda: trained_values(Net()).double(), "float64"),
        (mixed, "float16 and float64"),
    ],
)
def test_other_number_formats_are_computed_in_float32_and_said(build, formats):
    net = build()
    before = [tensor.dtype for tensor in net.state_dict().values()]
    opening = opened(net)
    assert opening.notes == (f"The module has {formats} tensors; everything is computed in float32.",)
    tensors = [
        *opening.model.state_dict().values(),
        *(v for v in vars(opening.model).values() if isinstance(v, torch.Tensor)),
    ]
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float32}
    assert [tensor.dtype for tensor in net.state_dict().values()] == before


def holding(name: str, tensor: torch.Tensor) -> nn.Module:
    net = Net()
    if tensor.dtype in (torch.int8, torch.float8_e4m3fn):
        net.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    else:
        net.register_buffer(name, tensor)
    return net


def spoiled(value: float) -> nn.Module:
    net = Net()
    net.conv2.weight.data[0, 0] = value
    return net


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: Net().to("meta"), "`conv1.weight` is on the meta device: load its weights"),
        (
            lambda: holding("codes", torch.zeros(3, dtype=torch.int8)),
            "`codes` is int8: give the module as it was before",
        ),
        (lambda: holding("codes", torch.zeros(3).to(torch.float8_e4m3fn)), "`codes` is float8_e4m3fn"),
        (lambda: holding("freqs", torch.zeros(3, dtype=torch.complex64)), "`freqs` holds complex ones"),
        (lambda: holding("sparse", torch.eye(3).to_sparse()), "`sparse` is sparse"),
        (lambda: spoiled(float("nan")), "`conv2.weight` holds 9 NaN or Inf values"),
        (lambda: spoiled(float("inf")), "`conv2.weight` holds 9 NaN or Inf values"),
        (
            lambda: nn.Sequential(nn.LazyConv2d(8, 3), nn.Flatten(), nn.LazyLinear(4)),
            "`0.weight` is not initialised yet",
        ),
        (
            lambda: torch.ao.quantization.quantize_dynamic(Net().eval(), {nn.Linear}, dtype=torch.qint8),
            "its `head` is a Linear of torch's quantization",
        ),
    ],
)
def test_tensors_that_are_no_real_finite_floats_are_refused_by_name(build, sentence):
    assert sentence in refusal(build())


def test_an_infinite_mask_is_no_fault():
    assert opened(holding("mask", torch.full((2,), -float("inf")))).notes == ()
