"""In-place operations made functional: the same answers, and no tensor changes after it was made."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from compress.tracing import capture
from compress.tracing.functional import InPlaceError, make_functional

CASES: dict[str, Callable[[Net, Tensor], Tensor]] = {}


class Net(nn.Module):
    def __init__(self, body: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.body = body
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.act, self.hardswish, self.flat = nn.ReLU(inplace=True), nn.Hardswish(inplace=True), nn.Flatten()
        self.drop, self.same = nn.Dropout(0.5), nn.Identity()
        self.scale = nn.Parameter(torch.randn(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def case(body: Callable[[Net, Tensor], Tensor]) -> None:
    CASES[body.__name__] = body


@case
def skip_taken_before_an_in_place_module(net, x):
    x = net.a(x)
    y = net.b(net.act(x))
    return x + y


@case
def statements(net, x):
    x = net.a(x)
    y = net.b(x)
    y.add_(x)
    F.relu_(y)
    return y + x


@case
def augmented_assignment_under_two_names(net, x):
    x = net.a(x)
    y = x
    y += 1
    z = y
    z *= 2
    return net.b(y) + x


@case
def one_relu_called_three_times(net, x):
    x = net.a(x)
    y = net.act(x)
    z = net.b(y)
    w = net.act(z)
    return x + y + net.act(net.b(w)) + z


@case
def flags_by_name_and_by_place(net, x):
    x = net.a(x)
    y = F.leaky_relu(F.relu(x, True), 0.1, inplace=True)
    F.hardtanh(y, -0.2, 0.2, True)
    return net.b(x) + net.hardswish(x)


@case
def part_of_a_tensor(net, x):
    x = net.a(x)
    part = x[:, :4]
    part.relu_()
    return net.b(x) + x


@case
def chained_on_a_part(net, x):
    x = net.a(x)
    x[:, ::2].mul_(2).clamp_(-1, 1)
    x[:, 1:3] += x[:, 5:7]
    return net.b(x)


@case
def assignment_to_items(net, x):
    x = net.a(x)
    before = x + 0
    x[:, 0] = 0
    x[x < -1] = 0.1
    x[:, 2:4] = x[:, 4:6] + 1
    return net.b(x) + before


@case
def chunks_that_do_not_overlap(net, x):
    x = net.a(x)
    one, two = x.chunk(2, 1)
    net.act(one)
    return net.b(x) + torch.cat([two, one], 1)


@case
def chunk_taken_before_and_read_after(net, x):
    x = net.a(x)
    parts = x.chunk(2, 1)
    x.relu_()
    return torch.cat([parts[1], parts[0]], 1)


@case
def views_of_a_changed_tensor(net, x):
    x = net.a(x)
    rows, turned, flat = x.view(x.shape[0], 8, -1), x.transpose(1, 2), net.flat(x)
    x.clamp_(-0.1, 0.2)
    flat.mul_(flat.mean())
    return rows.mean(-1) + turned.mean((1, 3)) + x.mean((2, 3))


@case
def overlapping_parts_one_after_the_other(net, x):
    x = net.a(x)
    one, two = x[:, :4], x[:, 2:6]
    one.relu_()
    two.neg_()
    one.mul_(3)
    return net.b(x) + torch.cat([one, two], 1)


@case
def the_image_itself(net, x):
    first = net.a(x)
    x.sub_(0.5).div_(0.25)
    x[:, 0] -= 1
    return first + net.a(x)


@case
def out_arguments(net, x):
    x = net.a(x)
    y = torch.empty_like(x)
    torch.add(x, net.b(x), out=y)
    torch.mul(y, x, out=x)
    return x + y


@case
def through_what_passes_its_input_on(net, x):
    x = net.a(x)
    y = net.same(net.drop(x))
    y.detach().relu_()
    x.data.neg_()
    return net.b(x) + y.contiguous()


@case
def copies_and_fills(net, x):
    x = net.a(x)
    y = net.b(x)
    x.copy_(y)
    y.narrow(1, 0, 3).fill_(0.3)
    y[:, :, :2].zero_()
    return x + y


@case
def another_shape_in_place(net, x):
    x = net.a(x).mean((2, 3))
    x.unsqueeze_(-1)
    x.unsqueeze_(-1)
    return net.b(x)


@case
def a_constant_that_is_filled_while_it_runs(net, x):
    x = net.a(x)
    mask = torch.zeros(8, device=x.device)
    before = x * mask.view(1, -1, 1, 1)
    mask[2] = 1
    mask += 0.5
    return x * mask.view(1, -1, 1, 1) + before


@case
def a_parameter_of_its_own(net, x):
    x = net.a(x)
    scale = net.scale * 1
    scale.add_(1)
    return x * scale + net.scale


@pytest.mark.parametrize("name", CASES)
def test_answers_stay_and_nothing_works_in_place(name):
    torch.manual_seed(0)
    net = Net(CASES[name]).eval()
    images = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        expected = net(images.clone())
        graph_module = capture(net, torch.randn(2, 3, 8, 8)).graph_module
        make_functional(graph_module, torch.randn(2, 3, 8, 8))
        given = images.clone()
        got = [graph_module(given) for _ in range(2)]
    assert all(torch.equal(expected, one) for one in got)
    assert torch.equal(given, images), "the caller's images stay as they were"
    changing = Changing(graph_module)
    with torch.no_grad():
        changing.run(images.clone())
    assert changing.found == []


class Changing(fx.Interpreter):
    """Lists the nodes that change a tensor which anything but themselves reads."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.found: list[str] = []

    def run_node(self, n: fx.Node) -> object:
        before = {node: value._version for node, value in self.env.items() if isinstance(value, Tensor)}
        result = super().run_node(n)
        moved = [node for node, version in before.items() if self.env[node]._version != version]
        private = [node for node in moved if node.target == "clone" and node.op == "call_method"]
        if len(moved) > len(private):
            self.found.append(n.name)
        return result


def test_what_is_not_changed_stays_as_it_was():
    net = Net(lambda net, x: net.b(torch.relu(net.a(x)))).eval()
    graph_module = capture(net, torch.randn(2, 3, 8, 8)).graph_module
    before = [(node.op, node.target, node.args) for node in graph_module.graph.nodes]
    make_functional(graph_module, torch.randn(2, 3, 8, 8))
    assert [(node.op, node.target, node.args) for node in graph_module.graph.nodes] == before


def test_names_of_nodes_are_those_of_torch_fx():
    def body(net: Net, x: Tensor) -> Tensor:
        x = net.a(x)
        x += net.b(x)
        return x

    net = Net(body).eval()
    graph_module = capture(net, torch.randn(2, 3, 8, 8)).graph_module
    make_functional(graph_module, torch.randn(2, 3, 8, 8))
    assert [node.name for node in graph_module.graph.nodes if node.target is operator.add] == ["add"]


def change_both(one: Tensor, two: Tensor) -> None:
    one.add_(1)
    two.add_(2)


fx.wrap("change_both")


def test_an_operation_that_changes_two_tensors_is_refused_by_name():
    def body(net: Net, x: Tensor) -> Tensor:
        x, y = net.a(x), net.a(x)
        change_both(x, y)
        return x + y

    net = Net(body).eval()
    graph_module = capture(net, torch.randn(2, 3, 8, 8)).graph_module
    with pytest.raises(InPlaceError, match="`change_both` changes more than one tensor in place"):
        make_functional(graph_module, torch.randn(2, 3, 8, 8))
