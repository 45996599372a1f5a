"""Forward passes with ordinary code: opened, equal to the module for any number of images, or refused by the line."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from pruning_networks import randomise
from torch import Tensor, nn
from torch.utils import _pytree
from user_modules_tracing import BODIES, REFUSED, MyConv, Net, NormAct, SamePad, Standardised

from compress import quantization
from compress.errors import PruningError, QuantizationError
from compress.pruning import plan, prune
from compress.tracing import capture, is_torch_layer, layer_type
from compress.tracing.graph import probe, trace, traced_copy

IMAGE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
PRUNED = ("unpacked_sizes", "sizes_as_numbers", "loop_over_a_split", "subclasses",
          "activation_of_its_own", "assignment", "checks", "flags_of_a_shape", "positions")  # fmt: skip


def network(body: str) -> Net:
    torch.manual_seed(0)
    return randomise(Net(BODIES[body] if body in BODIES else REFUSED[body][0])).eval()


def leaves(answer: object) -> list[Tensor]:
    if hasattr(answer, "__dataclass_fields__"):
        answer = vars(answer)
    return [leaf for leaf in _pytree.tree_leaves(answer) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("body", BODIES)
def test_ordinary_code_is_opened_for_any_number_of_images(body):
    model = network(body)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph_module = traced_copy(model, IMAGE)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    for count in (1, 2, 5):
        images = torch.rand(count, 3, 32, 32)
        with torch.no_grad():
            expected, got = leaves(model(images)), leaves(graph_module(images))
        assert len(expected) == len(got)
        for one, two in zip(expected, got, strict=True):
            assert torch.allclose(one, two, rtol=0, atol=1e-5 * float(one.abs().max()))


@pytest.mark.parametrize("body", PRUNED)
def test_what_is_opened_is_pruned_and_quantized(body):
    model = network(body)
    found = plan(model, IMAGE, sparsity=0.5)
    shrunk = prune(model, IMAGE, found, "l1-norm").model
    assert sum(p.numel() for p in shrunk.parameters()) < sum(p.numel() for p in model.parameters())
    prepared = quantization.prepare(shrunk.eval(), torch.rand(2, 3, 32, 32))
    called = {str(node.target) for node in prepared.graph.nodes}
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)} & called
    assert set(quantization.quantized_layers(prepared)) == layers >= {"stem.0", "conv", "head"}
    assert not quantization.left_float(prepared)  # also no BatchNorm that was folded and still holds its activation


@pytest.mark.parametrize("body", REFUSED)
def test_what_cannot_be_opened_is_refused_in_words_about_the_model(body):
    with pytest.raises(PruningError, match=f"^Net (cannot be traced: its forward pass )?{REFUSED[body][1]}") as refusal:
        plan(network(body), IMAGE, sparsity=0.5)
    assert not any(word in str(refusal.value) for word in ("torch.fx", "symbolic", "Proxy", "FakeTensor"))


def test_quantization_refuses_in_the_same_words():
    with pytest.raises(QuantizationError, match="Net cannot be traced: its forward pass chooses its way by the values"):
        quantization.prepare(network("branch_by_values"), torch.rand(2, 3, 32, 32))


def test_a_subclass_is_a_layer_when_it_changes_nothing():
    assert layer_type(MyConv(3, 8, 1)) is nn.Conv2d and is_torch_layer(MyConv(3, 8, 1))
    assert layer_type(SamePad(3, 8, 1)) is SamePad and not is_torch_layer(NormAct(8))
    patched = MyConv(3, 8, 1)
    patched.forward = lambda x: x
    assert layer_type(patched) is MyConv


def test_a_call_on_a_layers_own_tensors_is_that_layer():
    def called(body: str) -> dict[str, type]:
        graph_module = trace(network(body), IMAGE)
        nodes = [str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"]
        return {name: type(graph_module.get_submodule(name)) for name in nodes}

    assert called("padding_of_its_own")["same"] is nn.Conv2d
    assert called("activation_of_its_own") | {"norm_act": nn.BatchNorm2d, "norm_act.act": nn.ReLU} == called(
        "activation_of_its_own"
    )
    assert "odd" not in called("weight_of_its_own") and Standardised.forward is not nn.Conv2d.forward


def test_what_was_asked_about_sizes_is_recorded_with_its_line():
    graph_module = traced_copy(network("branch_by_size"), IMAGE)
    (asked,) = {str(decision) for decision in graph_module.meta["decisions"]}
    assert asked.startswith("user_modules_tracing.py, line ") and asked.endswith("if x.shape[-1] > 8 else x)` was True")
    assert graph_module.meta["holds_for"](torch.zeros(1, 3, 64, 64))
    assert not graph_module.meta["holds_for"](torch.zeros(1, 3, 16, 16))


def test_a_graph_that_asks_about_sizes_is_not_probed_with_a_size_that_answers_otherwise():
    large = torch.rand(1, 3, 96, 96)
    assert len(probe(traced_copy(network("unpacked_sizes"), large), large)[0, 0]) == 32
    model = network("branch_by_size")
    model.body = lambda net, x: net.end(net.stem(x) if x.shape[-1] > 64 else x[:, :1])
    assert len(probe(traced_copy(model, large), large)[0, 0]) == 96


def test_hooks_on_the_module_itself_are_part_of_the_graph():
    model = network("checks")
    model.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    graph_module = capture(model, IMAGE).graph_module
    with torch.no_grad():
        assert torch.equal(graph_module(IMAGE), model(IMAGE))


def test_without_an_example_what_asks_for_sizes_says_so():
    with pytest.raises(PruningError, match="and no example image was given to decide by, at user_modules_tracing.py"):
        trace(network("flags_of_a_shape"))


def test_other_threads_trace_and_run_models_meanwhile():
    """torch.fx patches every module of the process while it traces."""

    def network() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()

    def taken(_: int) -> None:
        for _ in range(10):
            capture(network(), torch.rand(1, 3, 16, 16))

    def called(_: int) -> None:
        model = network()
        for _ in range(300):
            model(torch.rand(1, 3, 16, 16))

    with ThreadPoolExecutor(3) as pool:
        ended = [pool.submit(work, 0) for work in (taken, taken, called)]
    assert [future.result() for future in ended] == [None] * 3
