"""Least-squares reconstruction: the remaining weights are refitted to the dense model's feature maps, before any training.

Each layer of the pruned model is refitted, in the order of the forward pass, so that on a few hundred training images
its outputs come as near as they can to the dense model's outputs in the kept channels:

    minimise over W:  ||Y - X W||^2 + n s^2 ||W||^2 + damping * ||diag(X'X)^(1/2) (W - W_pruned)||^2

X is what the layer reads in the pruned model, with all layers before it refitted already; Y is what the dense layer
answers. The second term is what rounding the n rows of X to integers will add, s being the deviation of the rounding
(noise on inputs is a ridge: Bishop 1995, "Training with Noise is Equivalent to Tikhonov Regularization"). Without it
large weights that cancel each other fit best, and 8 bits make noise of them. The first and the last term are the
reconstruction of He et al. 2017 ("Channel Pruning for Accelerating Very Deep Neural Networks", section 3) and Luo et
al. 2017 ("ThiNet"), with a ridge towards the pruned weights. The strength of that ridge is chosen per layer on held-out
images, and a layer that no fit brings nearer keeps its weights. Every BatchNorm gets the statistics of its new inputs. No label is used.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from compress.pruning.graph.tensors import owners
from compress.tracing.graph import call_counts, structure_copy, trace

CHUNK = 32
"""Images that go through a layer at once."""
MEMORY = 2**30
"""Bytes that the activations of all images may take; fewer images are used when they would take more."""
POSITIONS = 16_384
"""Answers of a layer that it is fitted to, over all images; many more cost time and change nothing."""
NUMBERS = 2**26
"""What is read at those positions is at most this many numbers."""
MOST_INPUTS = 4608
"""A layer that reads more numbers per answer keeps its weights: the normal equations would take minutes."""
DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0)
HELD_OUT = 0.2
"""Share of the images that choose the damping."""


@dataclass(frozen=True)
class Refit:
    """Distance of one layer's outputs from the dense layer's before and after, on held-out images.

    Errors are sums of squares relative to those of the dense layer's outputs, >= 0.
    """

    layer: str
    error_before: float
    error_after: float


def reconstruct(
    shrunk: nn.Module,
    dense: nn.Module,
    kept: Mapping[str, Tensor],
    images: Tensor,
    *,
    bits: int = 8,
    weights: bool = True,
) -> tuple[Refit, ...]:
    """Refit `shrunk` in place to `dense`, and re-estimate its BatchNorm statistics on the way.

    Args:
        shrunk: the pruned model, on the CPU; only the values of weights, biases and running statistics change.
        dense: the model that it was made from; only read.
        kept: layer -> which of the dense layer's output channels the shrunk one has, bool [channels].
        images: float32 [N, 3, H, W] training images, normalised; the first ones, where all would take too much memory.
        bits: that the activations will have; 2 to 8, or more where they stay in floating point.
        weights: False only re-estimates the BatchNorm statistics.

    Returns: one entry per layer that was refitted, in the order of the forward pass.
    """
    target, source = (
        trace(structure_copy(model).eval(), images[:1], opens_attention=False) for model in (shrunk, dense)
    )
    nodes = list(zip(target.graph.nodes, source.graph.nodes, strict=True))
    called = call_counts(target)
    tied = {key for key, names in owners(target).items() if len(names) > 1}
    with torch.no_grad():
        chunks = torch.split(images[: affordable(target, source, images)], CHUNK)
        students, teachers = ([_Walk(graph, chunk) for chunk in chunks] for graph in (target, source))
        refits = []
        for node, same in nodes:
            for walk in teachers:
                walk.step(same)
            layer = target.get_submodule(str(node.target)) if node.op == "call_module" else None
            if called[str(node.target)] > 1 or (layer is not None and tied & {id(t) for t in layer.parameters()}):
                pass  # what is right for one call is wrong for another
            elif isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None:
                _take_statistics(layer, [walk.read(node) for walk in students])
            elif weights and isinstance(layer, nn.Conv2d | nn.Linear) and type(layer) in (nn.Conv2d, nn.Linear):
                targets = [_kept(walk.env[same], layer, kept.get(str(node.target))) for walk in teachers]
                errors = _refit(layer, [walk.read(node) for walk in students], targets, bits)
                refits += [Refit(str(node.target), *errors)] if errors else []
            for walk in students:
                walk.step(node)
            for walk, done in itertools.chain(((w, node) for w in students), ((w, same) for w in teachers)):
                walk.forget(done)
    return tuple(refits)


def affordable(target: fx.GraphModule, source: fx.GraphModule, images: Tensor) -> int:
    """How many of `images` [N, 3, H, W] have activations that fit into MEMORY, measured with one; at least one chunk."""
    most = 0
    walks = [(_Walk(graph, images[:1]), list(graph.graph.nodes)) for graph in (target, source)]
    for nodes in zip(*(nodes for _, nodes in walks), strict=True):
        for (walk, _), node in zip(walks, nodes, strict=True):
            walk.step(node)
        most = max(most, sum(walk.bytes() for walk, _ in walks))
        for (walk, _), node in zip(walks, nodes, strict=True):
            walk.forget(node)
    return max(CHUNK, MEMORY // max(most, 1))


class _Walk(fx.Interpreter):
    """One chunk of images on its way through a graph, node by node."""

    def __init__(self, graph_module: fx.GraphModule, images: Tensor) -> None:
        super().__init__(graph_module)
        self.env = {}
        self.args_iter = iter([images])

    def step(self, node: fx.Node) -> None:
        self.env[node] = self.run_node(node)

    def read(self, node: fx.Node) -> Tensor:
        """What a module with one input reads."""
        (value, *_), _ = self.fetch_args_kwargs_from_env(node)
        tensor: Tensor = value
        return tensor

    def forget(self, node: fx.Node) -> None:
        """Let go of what no later node reads."""
        for dead in self.user_to_last_uses.get(node, []):
            del self.env[dead]

    def bytes(self) -> int:
        return sum(value.nbytes for value in self.env.values() if isinstance(value, Tensor))


def _kept(answers: Tensor, layer: nn.Conv2d | nn.Linear, channels: Tensor | None) -> Tensor:
    """The dense layer's answers in the kept channels, channels last: [..., channels]."""
    answers = answers.movedim(1, -1) if isinstance(layer, nn.Conv2d) else answers
    return answers if channels is None else answers[..., channels.to(answers.device)]


def _take_statistics(norm: nn.modules.batchnorm._BatchNorm, read: list[Tensor]) -> None:
    values = torch.cat([chunk.movedim(1, 0).flatten(1) for chunk in read], 1)
    norm.get_buffer("running_mean").copy_(values.mean(1))
    norm.get_buffer("running_var").copy_(values.var(1))


# ---- one layer ----------------------------------------------------------------------------------------------------


def _refit(
    layer: nn.Conv2d | nn.Linear, read: list[Tensor], targets: list[Tensor], bits: int
) -> tuple[float, float] | None:
    """Moves the layer's weights to where its answers come nearest to `targets`; relative errors before and after.

    None when the layer keeps its weights: frozen, too wide, padded in an uncommon way, or right as it is.
    """
    inputs = layer.weight[0].numel() + (layer.bias is not None)
    padding = getattr(layer, "padding_mode", "zeros"), getattr(layer, "padding", ())
    if not layer.weight.requires_grad or inputs > MOST_INPUTS or padding[0] != "zeros" or isinstance(padding[1], str):
        return None
    fit, held_out = _equations(layer, read, targets, inputs, bits)
    scale = float(held_out.answers.square().sum())
    nothing = torch.zeros_like(fit.weights)
    if held_out.error(nothing) <= 1e-9 * scale:
        return None
    before = held_out.error(nothing)
    nearer = [change for change in _solutions(fit) if held_out.error(change) < before]
    change = min((nothing, *nearer), key=held_out.expected_error)
    _add(layer, change)
    return before / scale, held_out.error(change) / scale


@dataclass(frozen=True)
class _Equations:
    """`inputs` @ (`weights` + change) should be `answers`, for each group of a grouped convolution."""

    inputs: Tensor
    """[groups, positions, inputs], with a column of ones when the layer has a bias."""
    weights: Tensor
    """[groups, inputs, outputs]"""
    answers: Tensor
    """[groups, positions, outputs]"""
    noise: Tensor
    """Variance that rounding will add to each input: [inputs, 1]; 0 for the ones."""

    def residual(self, change: Tensor) -> Tensor:
        return self.answers - self.inputs @ (self.weights + change)

    def error(self, change: Tensor) -> float:
        """Sum of squares over all positions."""
        return float(self.residual(change).square().sum())

    def expected_error(self, change: Tensor) -> float:
        """The same with rounded inputs."""
        added = self.inputs.shape[1] * (self.noise * (self.weights + change).square()).sum()
        return self.error(change) + float(added)


def _equations(
    layer: nn.Conv2d | nn.Linear, read: list[Tensor], targets: list[Tensor], inputs: int, bits: int
) -> tuple[_Equations, _Equations]:
    """What the layer reads and should answer at randomly chosen positions: to fit on, and from other images to judge."""
    images = sum(len(chunk) for chunk in read)
    per_image = max(1, min(POSITIONS, NUMBERS // inputs) // images)
    generator = torch.Generator().manual_seed(0)
    xs, ys = [], []
    for chunk, answers in zip(read, targets, strict=True):
        places = torch.randperm(answers[0, ..., 0].numel(), generator=generator)[:per_image]
        xs.append(
            _patches(layer, chunk, places, answers.shape[2]) if isinstance(layer, nn.Conv2d) else _at(chunk, places)
        )
        ys.append(_at(answers, places))
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    x, y = torch.cat(xs), torch.cat(ys)  # [images, positions, groups * inputs], [images, positions, outputs]
    x, y = (_by_group(values, groups) for values in (x, y))
    step = float(x.abs().max()) / (2 ** (bits - 1) - 1)
    noise = torch.full((x.shape[-1], 1), step**2 / 12)
    weights = layer.weight.detach().reshape(groups, len(layer.weight) // groups, -1).transpose(1, 2)
    if layer.bias is not None:
        x = torch.cat([x, torch.ones_like(x[..., :1])], -1)
        weights = torch.cat([weights, layer.bias.detach().view(groups, 1, -1)], 1)
        noise = torch.cat([noise, torch.zeros(1, 1)])
    held_out = max(1, int(images * HELD_OUT))
    return (
        _Equations(x[:, held_out:].flatten(1, 2), weights, y[:, held_out:].flatten(1, 2), noise),
        _Equations(x[:, :held_out].flatten(1, 2), weights, y[:, :held_out].flatten(1, 2), noise),
    )


def _by_group(values: Tensor, groups: int) -> Tensor:
    """[N, positions, groups * channels] -> [groups, N, positions, channels]."""
    return values.reshape(*values.shape[:-1], groups, values.shape[-1] // groups).permute(2, 0, 1, 3)


def _patches(layer: nn.Conv2d, maps: Tensor, places: Tensor, width: int) -> Tensor:
    """What a convolution reads at `places` of its output: [N, places, channels * kernel]."""
    (down, right), (high, wide) = layer.stride, layer.dilation
    rows, columns = places // width * down, places % width * right
    above, left = (int(size) for size in layer.padding)
    padded = F.pad(maps, (left, left, above, above))
    taps = itertools.product(range(layer.kernel_size[0]), range(layer.kernel_size[1]))
    read = torch.stack([padded[:, :, rows + i * high, columns + j * wide] for i, j in taps], 2)
    return read.flatten(1, 2).transpose(1, 2)


def _at(values: Tensor, places: Tensor) -> Tensor:
    """[N, ..., channels] at `places` of the dimensions between: [N, places, channels]."""
    return values.reshape(len(values), -1, values.shape[-1])[:, places]


def _solutions(equations: _Equations) -> Iterator[Tensor]:
    """The best change of the weights for each damping: [groups, inputs, outputs]."""
    x, nothing = equations.inputs, torch.zeros_like(equations.weights)
    rounding = (x.shape[1] * equations.noise).double()
    right = (x.transpose(1, 2) @ equations.residual(nothing)).double() - rounding * equations.weights
    sizes = x.square().sum(1)[:, :, None].double().sqrt()
    sizes = sizes.clamp_min(1e-6 * float(sizes.max()) + 1e-30)
    solve = _by_positions if x.shape[1] < x.shape[2] else _by_inputs
    yield from solve(x, right, [rounding + damping * sizes.square() for damping in DAMPINGS])


def _by_inputs(x: Tensor, right: Tensor, ridges: Sequence[Tensor]) -> Iterator[Tensor]:
    """(x'x + diag(ridge))^-1 right for each ridge ([groups, inputs, 1]), as one equation per input."""
    gram = (x.transpose(1, 2) @ x).double()
    for ridge in ridges:
        scale = ridge.sqrt()
        scaled = gram / scale / scale.transpose(1, 2)
        factor = torch.linalg.cholesky(scaled + torch.eye(gram.shape[1], dtype=gram.dtype))
        yield (torch.cholesky_solve(right / scale, factor) / scale).float()


def _by_positions(x: Tensor, right: Tensor, ridges: Sequence[Tensor]) -> Iterator[Tensor]:
    """The same as one equation per position (Woodbury's identity): of small maps there are far fewer positions."""
    x = x.double()
    for ridge in ridges:
        start = right / ridge
        kernel = (x / ridge.transpose(1, 2)) @ x.transpose(1, 2)
        factor = torch.linalg.cholesky(kernel + torch.eye(kernel.shape[1], dtype=kernel.dtype))
        yield (start - x.transpose(1, 2) @ torch.cholesky_solve(x @ start, factor) / ridge).float()


def _add(layer: nn.Conv2d | nn.Linear, change: Tensor) -> None:
    if layer.bias is not None:
        layer.bias.add_(change[:, -1].flatten())
        change = change[:, :-1]
    layer.weight.add_(change.transpose(1, 2).reshape(layer.weight.shape))
