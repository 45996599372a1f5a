"""A traced graph without in-place operations: every node's value stays what it was when the node ran.

`x.relu_()` changes what every later reader of `x` sees, and of every view of `x`. A transformation that replaces the
operation, or sets another node between it and its readers, has to redirect them. Which tensors an operation changes,
and which share its memory, is observed while the graph runs once on images; so it holds for any operation.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree

from compress.errors import CompressError

_AUGMENTED = {
    getattr(operator, f"i{name.strip('_')}"): getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and_", "or_", "xor", "lshift", "rshift")
}
_ASSIGNMENTS = (operator.setitem, "__setitem__")
Step = tuple[str, tuple[Any, ...], dict[str, Any]]
"""Name of a tensor's method, and its arguments: one view of another tensor."""


_RESHAPES = ("squeeze", "unsqueeze", "t", "transpose", "swapaxes", "swapdims", "detach", "as_strided")
"""With an underscore these give the tensor another shape; the numbers in its memory stay."""


class InPlaceError(CompressError):
    """An in-place operation of which it is not known who reads its result; the text names the operation."""


def make_functional(graph_module: fx.GraphModule, images: Tensor) -> None:
    """Replace each in-place operation of a graph in eval mode, and let later readers read its result; answers stay.

    Parts of a tensor are written to a copy of the whole (`written`), of which later views are taken again.

    Args:
        images: [N, C, H, W], at least two; only shapes and memory matter.

    Raises:
        InPlaceError: what an operation changes is also read by a view that cannot be taken again.
    """
    recorder = _MutationRecorder(graph_module)
    with torch.inference_mode(False), torch.no_grad():
        recorder.run(images.clone())
    if recorder.changes:
        rewriter = _Rewriter(graph_module, recorder)
        for change in recorder.changes:
            rewriter.rewrite(change)
    for node in graph_module.graph.nodes:
        if node.op == "call_function":
            node.target = _AUGMENTED.get(node.target, node.target)  # of numbers: the tensors' are replaced by now
        if node.target is getattr and node.args[1] == "data":  # the same tensor, which ONNX cannot say in this way
            node.op, node.target, node.args = "call_method", "detach", node.args[:1]
    for module in graph_module.modules():
        if _changes_input(module):
            setattr(module, "inplace", False)  # noqa: B010 - nn.Module declares no such attribute
    graph_module.graph.lint()
    graph_module.recompile()


def written(whole: Tensor, steps: tuple[Step, ...], index: Any, value: Any) -> Tensor:
    """A copy of `whole`, a tensor of any shape, in which `value` is assigned to `index` of the view that `steps` lead to."""
    whole = whole.clone()
    part = whole
    for name, args, kwargs in steps:
        part = getattr(part, name)(*args, **kwargs)
    part[index] = value
    return whole


def after(value: Tensor, _operation: object) -> Tensor:
    """`value`, a tensor of any shape, after the operation that changes it."""
    return value


# ---- recording ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Change:
    """One in-place operation, as it was recorded."""

    node: fx.Node
    target: fx.Node
    """The operand that it changed."""
    same: tuple[fx.Node, ...]
    """Nodes that are read later and are the changed tensor itself, by another name."""
    overlapping: tuple[fx.Node, ...]
    """Nodes that are read later and share a part of its memory."""
    gives_operand: bool
    """Its result is the tensor that it changed."""


class _MutationRecorder(fx.Interpreter):
    """Runs a graph and records which memory every node reads, returns and changes."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.extra_traceback = False  # a refusal is handed on as it is
        self.changes: list[_Change] = []
        self.parent: dict[fx.Node, fx.Node] = {}
        """Node -> the operand of which it is a view."""
        self.layout: dict[fx.Node, Any] = {}
        self.reshaped: set[fx.Node] = set()
        """Nodes that were given another shape later; where a view of them was taken is not known."""
        self._attributes: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "get_attr":  # the model's own tensors stay as they are
            if str(n.target) not in self._attributes:
                value = super().run_node(n)
                self._attributes[str(n.target)] = value.detach().clone() if isinstance(value, Tensor) else value
            value = self._attributes[str(n.target)]
        else:
            before = {node: _state(value) for node, value in self.env.items()}
            value = super().run_node(n)
            moved = [node for node, state in before.items() if _state(self.env[node]) != state]
            if moved:
                self._note(n, value, moved)
        self.layout[n] = _layout(value)
        memory = _memory(value)
        for operand in n.all_input_nodes:
            if memory & _memory(self.env[operand]):
                self.parent.setdefault(n, operand)
        return value

    def _note(self, n: fx.Node, value: Any, moved: list[fx.Node]) -> None:
        operands = tuple(node for node in n.all_input_nodes if node in moved)
        target = _target(n, self.module, operands)
        tensor = self.env[target]
        memory, layout = _memory(tensor), _layout(tensor)
        sharing = [node for node, held in self.env.items() if memory & _memory(held)]
        if _plain(n) in _RESHAPES:
            same = sharing = [node for node, held in self.env.items() if held is tensor]
            self.reshaped.update(same)
        else:
            same = [node for node in sharing if _layout(self.env[node]) == layout]
        overlapping = [node for node in sharing if node not in same and _overlap(tensor, self.env[node])]
        self.changes.append(_Change(n, target, tuple(same), tuple(overlapping), value is tensor))


def _leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.numel() else []
    return [leaf for leaf in _pytree.tree_leaves(value) if isinstance(leaf, Tensor) and leaf.numel()]


def _memory(value: Any) -> set[int]:
    return {leaf.untyped_storage()._cdata for leaf in _leaves(value)}


def _state(value: Any) -> list[tuple[Any, ...]]:
    return [(leaf._version, leaf.shape, leaf.stride()) for leaf in _leaves(value)]


def _layout(value: Any) -> Any:
    """Equal for two tensors of one memory that show the same numbers of it."""
    if not isinstance(value, Tensor):
        return None
    return value.untyped_storage()._cdata, value.storage_offset(), value.shape, value.stride(), value.dtype


def _overlap(tensor: Tensor, other: Any) -> bool:
    if not isinstance(other, Tensor) or other.dtype != tensor.dtype:
        return True
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    touched = torch.zeros(size, dtype=torch.bool, device=tensor.device)
    touched.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
    return bool(touched.as_strided(other.shape, other.stride(), other.storage_offset()).any())


# ---- which operand an operation changes ---------------------------------------------------------------------------


def _target(node: fx.Node, root: nn.Module, operands: tuple[fx.Node, ...]) -> fx.Node:
    """The operand that `node` changes, of those in changed memory."""
    first = node.args[0] if node.args else node.kwargs.get("input")
    operand = node.kwargs.get("out", first)
    named = node.op == "call_module" or "out" in node.kwargs or node.target in _ASSIGNMENTS
    named = named or _plain(node) is not None or _has_flag(node)
    if isinstance(operand, fx.Node) and operand in operands and (named or len(operands) == 1):
        return operand
    if len(operands) != 1:
        raise InPlaceError(
            f"The operation {_name(node)} changes more than one tensor in place, or one that it is not given; rewrite it so "
            "that it returns new tensors."
        )
    return operands[0]


def _changes_input(module: nn.Module) -> bool:
    """Torch's own modules only: in another one the attribute may mean anything."""
    return type(module).__module__.startswith("torch.nn.") and getattr(module, "inplace", False) is True


def _has_flag(node: fx.Node) -> bool:
    return node.op == "call_function" and _bound(node) is not None


def _bound(node: fx.Node) -> inspect.BoundArguments | None:
    """The arguments by name, of a function that is called with a true `inplace`."""
    try:
        bound = inspect.signature(cast(Callable[..., Any], node.target)).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):
        return None
    return bound if bound.arguments.get("inplace") is True else None


def _plain(node: fx.Node) -> Any:
    """The function, or the method's name, that gives what an in-place one writes; None where there is none."""
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        if node.target in _AUGMENTED:
            return _AUGMENTED[node.target]
        if name.endswith("_") and not name.endswith("__"):
            return next((getattr(place, name[:-1]) for place in (torch, F) if getattr(place, name, None) is node.target
                         and hasattr(place, name[:-1])), None)  # fmt: skip
    if node.op == "call_method":
        name = str(node.target)
        name = f"{name[3:-2]}_" if name.startswith("__i") and name.endswith("__") else name
        if name.endswith("_") and not name.endswith("__") and hasattr(Tensor, name[:-1]):
            return name[:-1]
    return None


def _name(node: fx.Node) -> str:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    inside = f" in {stack[-1][0]}" if stack and stack[-1][0] else ""
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.name)
    return f"`{target}`{inside}"


# ---- rewriting ----------------------------------------------------------------------------------------------------


class _Rewriter:
    """Replaces the changes of one graph, in their order."""

    def __init__(self, graph_module: fx.GraphModule, recorder: _MutationRecorder) -> None:
        self._module, self._graph, self._recorder = graph_module, graph_module.graph, recorder
        self._position = {node: number for number, node in enumerate(self._graph.nodes)}
        self._latest: dict[fx.Node, fx.Node] = {}
        self._paths = {node: self._path(node) for node in self._graph.nodes}

    def rewrite(self, change: _Change) -> None:
        """Make the operation give a new tensor, and give it, and views of it, to everything that reads later."""
        target = change.target
        value = self._functional(change, target)
        for node in change.same:
            self._redirect(node, value, change.node)
        others = [node for node in change.overlapping if self._read_later(node, change.node)]
        if not others:
            return
        root, steps = self._paths[target] or self._refuse(change.node, target)
        whole = value
        if self._recorder.layout[root] is None:
            self._refuse(change.node, root)
        if self._recorder.layout[root] != self._recorder.layout[target]:
            whole = self._insert(change.node, value, written, (self._current(root), steps, ..., value))
        for node in others:
            path = self._paths[node] or self._refuse(change.node, node)
            if path[0] is not root:
                self._refuse(change.node, node)
            self._redirect(node, self._view(change.node, whole, path[1]), change.node)
        self._latest[root] = whole

    def _functional(self, change: _Change, target: fx.Node) -> fx.Node:
        """The node of the changed tensor's new value."""
        node = change.node
        if node.op == "call_module" and _changes_input(self._module.get_submodule(str(node.target))):
            return node  # its flag is taken back at the end
        if node.op == "call_function" and (bound := _bound(node)):
            node.args, node.kwargs = (), {**bound.arguments, "inplace": False}
            first = next(iter(bound.arguments))
            node.args, node.kwargs = (node.kwargs[first],), {k: v for k, v in node.kwargs.items() if k != first}
            return node
        if node.target in _ASSIGNMENTS:
            value = self._insert(node, node, written, (node.args[0], (), node.args[1], node.args[2]))
            self._graph.erase_node(node)
            return value
        plain = _plain(node)
        if plain is not None and change.gives_operand and "out" not in node.kwargs:
            node.target = plain
            return node
        with self._graph.inserting_before(node):
            private = self._graph.call_method("clone", (self._current(target),))
        self._position[private] = self._position[node]
        node.replace_input_with(self._current(target), private)
        return node if change.gives_operand else self._insert(node, node, after, (private, node))

    def _insert(self, at: fx.Node, behind: fx.Node, function: Any, args: tuple[Any, ...]) -> fx.Node:
        with self._graph.inserting_after(behind):
            node = self._graph.call_function(function, args)
        return self._placed(node, at)

    def _placed(self, node: fx.Node, at: fx.Node) -> fx.Node:
        self._position[node] = self._position[at]
        node.meta = dict(at.meta)
        return node

    def _view(self, at: fx.Node, whole: fx.Node, steps: tuple[Step, ...]) -> fx.Node:
        for name, args, kwargs in steps:
            with self._graph.inserting_after(whole):
                if name == "__getitem__":
                    node = self._graph.call_function(operator.getitem, (whole, *args))
                elif name == "__getattribute__":
                    node = self._graph.call_function(getattr, (whole, *args))
                else:
                    node = self._graph.call_method("reshape" if name == "view" else name, (whole, *args), dict(kwargs))
            whole = self._placed(node, at)
        return whole

    def _current(self, node: fx.Node) -> fx.Node:
        return self._latest.get(node, node)

    def _read_later(self, node: fx.Node, change: fx.Node) -> bool:
        return any(self._position[user] > self._position[change] for user in self._current(node).users)

    def _redirect(self, node: fx.Node, value: fx.Node, change: fx.Node) -> None:
        moment, old = self._position[change], self._current(node)
        if old is not value:
            old.replace_all_uses_with(value, delete_user_cb=lambda user: self._position[user] > moment)
        self._latest[node] = value

    def _path(self, node: fx.Node) -> tuple[fx.Node, tuple[Step, ...]] | None:
        """The tensor that owns the memory, and the views that lead from it to `node`; None where a view is not known."""
        steps: list[Step] = []
        while node in self._recorder.parent and node not in self._recorder.reshaped:
            parent = self._recorder.parent[node]
            if self._recorder.layout[parent] is None or self._recorder.layout[parent] != self._recorder.layout[node]:
                step = _step(node, parent, self._module)
                if step is None:
                    return None
                steps.insert(0, step)
            node = parent
        return None if node in self._recorder.reshaped else (node, tuple(steps))

    def _refuse(self, change: fx.Node, view: fx.Node) -> Any:
        raise InPlaceError(
            f"The operation {_name(change)} changes a tensor in place that is also read as {_name(view)}; rewrite it "
            "without in-place operations, such as `x = x.relu()` in place of `x.relu_()`."
        )


def _step(node: fx.Node, parent: fx.Node, root: nn.Module) -> Step | None:
    """How to take the view `node` of the tensor that `parent` is."""
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        if isinstance(module, nn.Flatten):
            return "flatten", (module.start_dim, module.end_dim), {}
        return ("unflatten", (module.dim, module.unflattened_size), {}) if isinstance(module, nn.Unflatten) else None
    if not node.args or node.args[0] is not parent:
        return None
    rest: tuple[Any, ...] = tuple(node.args[1:])
    kwargs: Mapping[str, Any] = node.kwargs
    if node.op == "call_method":
        return str(node.target), rest, dict(kwargs)
    if node.target is operator.getitem:
        return "__getitem__", rest, {}
    if node.target is getattr:
        return "__getattribute__", rest, {}
    name = getattr(node.target, "__name__", "")
    return (name, rest, dict(kwargs)) if getattr(torch, name, None) is node.target and hasattr(Tensor, name) else None
