"""Attention with fewer heads than its embedding has room for, and how to get it from torch's and torchvision's modules.

Removing a head leaves an inner width (heads * head width) below the embedding's. `nn.MultiheadAttention` and
torchvision's window attention derive the head width from the embedding and cannot hold that, so they are replaced by
subclasses with the same tensors' names, the same call and the same arithmetic, which keep the head width instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

_Module = TypeVar("_Module", bound=nn.Module)


class PrunedMultiheadAttention(nn.MultiheadAttention):
    """Self-attention with in_proj_weight [3 * inner, embed_dim] and out_proj [embed_dim, inner]."""

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, *, need_weights: bool = True
    ) -> tuple[Tensor, None]:
        """Images' tokens [N, L, embed_dim], or [L, N, embed_dim] without `batch_first`; the answer has their shape.

        Raises ValueError for what pruned attention does not do: other keys than queries, or giving its weights.
        """
        if need_weights or key is not query or value is not query:
            raise ValueError("pruned attention is called as attention(x, x, x, need_weights=False)")
        tokens = query if self.batch_first else query.transpose(0, 1)
        packed = F.linear(tokens, self.in_proj_weight, self.in_proj_bias)
        q, k, v = packed.unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        answer = self.out_proj(attended.transpose(1, 2).flatten(2))
        return answer if self.batch_first else answer.transpose(0, 1), None


class PrunedShiftedWindowAttention(ShiftedWindowAttention):  # type: ignore[misc]  # torchvision has no types
    """Swin's window attention (Liu et al., arXiv:2103.14030) with qkv [3 * inner, dim] and proj [dim, inner]."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps [N, H, W, dim] to the same shape."""
        return _window_attention(self, x, None)


class PrunedShiftedWindowAttentionV2(ShiftedWindowAttentionV2):  # type: ignore[misc]  # torchvision has no types
    """The same with cosine similarity (Liu et al., arXiv:2111.09883)."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps [N, H, W, dim] to the same shape."""
        return _window_attention(self, x, self.logit_scale)


class PrunedRelativePositionalMultiHeadAttention(RelativePositionalMultiHeadAttention):  # type: ignore[misc]  # torchvision has no types
    """MaxViT's attention (Tu et al., arXiv:2204.01697) with to_qkv [3 * inner, dim] and merge [dim, inner]."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps partitions [N, groups, tokens, dim] to the same shape."""
        packed = self.to_qkv(x).unflatten(-1, (3, self.n_heads, self.head_dim))
        q, k, v = packed.permute(3, 0, 1, 4, 2, 5).unbind(0)
        similarity = torch.matmul(q, (k * self.scale_factor).transpose(-2, -1)) + self.get_relative_positional_bias()
        attended = torch.matmul(F.softmax(similarity, dim=-1), v)
        merged: Tensor = self.merge(attended.permute(0, 1, 3, 2, 4).flatten(3))
        return merged


def _window_attention(attention: ShiftedWindowAttention, x: Tensor, logit_scale: Tensor | None) -> Tensor:
    return window_attention(
        x,
        attention.qkv.weight,
        attention.proj.weight,
        attention.get_relative_position_bias(),
        attention.window_size,
        attention.num_heads,
        shift_size=attention.shift_size,
        attention_dropout=attention.attention_dropout,
        dropout=attention.dropout,
        qkv_bias=attention.qkv.bias,
        proj_bias=attention.proj.bias,
        logit_scale=logit_scale,
        training=attention.training,
    )


def window_attention(
    x: Tensor,
    qkv_weight: Tensor,
    proj_weight: Tensor,
    position_bias: Tensor,
    window: Sequence[int],
    heads: int,
    *,
    shift_size: Sequence[int],
    attention_dropout: float,
    dropout: float,
    qkv_bias: Tensor | None,
    proj_bias: Tensor | None,
    logit_scale: Tensor | None,
    training: bool,
) -> Tensor:
    """Torchvision's `shifted_window_attention`, with the head width read from `qkv_weight` instead of from `x`.

    Args:
        x: [N, H, W, dim].
        qkv_weight: [3 * inner, dim], `proj_weight` [dim, inner].
        position_bias: [1, heads, window area, window area].
        logit_scale: [heads, 1, 1], the logarithm of the temperature of cosine attention; None for scaled products.

    Returns: [N, H, W, dim].
    """
    tokens = window_tokens(x, window, shift_size)
    packed = F.linear(tokens, qkv_weight, without_key_bias(qkv_bias) if logit_scale is not None else qkv_bias)
    attended = attend_in_windows(
        x, packed, position_bias, logit_scale, window, heads, shift_size, attention_dropout if training else 0.0
    )
    projected = F.dropout(F.linear(attended, proj_weight, proj_bias), dropout, training)
    return maps_of_windows(x, projected, window, shift_size)


def window_tokens(x: Tensor, window: Sequence[int], shift_size: Sequence[int]) -> Tensor:
    """The tokens of each window of `x` [N, H, W, dim], padded and shifted: [N * windows, window area, dim]."""
    size, shift = _padded_size(x, window, shift_size)
    padded = F.pad(x, (0, 0, 0, size[1] - x.shape[2], 0, size[0] - x.shape[1]))
    return _windows(torch.roll(padded, (-shift[0], -shift[1]), (1, 2)) if any(shift) else padded, window)


def attend_in_windows(
    x: Tensor,
    packed: Tensor,
    position_bias: Tensor,
    logit_scale: Tensor | None,
    window: Sequence[int],
    heads: int,
    shift_size: Sequence[int],
    dropout: float = 0.0,
) -> Tensor:
    """What lies between the projections: queries, keys and values `packed` [N * windows, window area, 3 * inner] of `x`
    to [N * windows, window area, inner]."""
    size, shift = _padded_size(x, window, shift_size)
    q, k, v = packed.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    if logit_scale is None:
        similarity = (q * q.shape[-1] ** -0.5).matmul(k.transpose(-2, -1))
    else:
        temperature = torch.clamp(logit_scale, max=math.log(100.0)).exp()
        similarity = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)) * temperature
    similarity = similarity + position_bias
    if any(shift):
        mask = _shift_mask(x, size, window, shift)
        similarity = (similarity.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
    weights = F.dropout(F.softmax(similarity, dim=-1), dropout, training=dropout > 0)
    return weights.matmul(v).transpose(1, 2).flatten(2)


def maps_of_windows(x: Tensor, tokens: Tensor, window: Sequence[int], shift_size: Sequence[int]) -> Tensor:
    """The way back from `window_tokens`, to the shape of `x`."""
    size, shift = _padded_size(x, window, shift_size)
    whole = _maps(tokens, size, window)
    whole = torch.roll(whole, (shift[0], shift[1]), (1, 2)) if any(shift) else whole
    return whole[:, : x.shape[1], : x.shape[2]].contiguous()


for _name in ("window_attention", "window_tokens", "attend_in_windows", "maps_of_windows"):
    fx.wrap(_name)  # their sizes are numbers, which a graph of shapes yet unknown has not


def _padded_size(x: Tensor, window: Sequence[int], shift_size: Sequence[int]) -> tuple[tuple[int, int], list[int]]:
    """Height and width of whole windows, and the shift: a window as large as the map has nothing to shift."""
    height, width = x.shape[1:3]
    size = (height + -height % window[0], width + -width % window[1])
    return size, [0 if window[i] >= size[i] else shift_size[i] for i in range(2)]


def _windows(maps: Tensor, window: Sequence[int]) -> Tensor:
    """[N, H, W, C] to [N * windows, window area, C]."""
    parts: Tensor = maps.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0]))
    return parts.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def _maps(windows: Tensor, size: tuple[int, int], window: Sequence[int]) -> Tensor:
    """The way back: [N * windows, window area, C] to [N, H, W, C]."""
    rows, columns = size[0] // window[0], size[1] // window[1]
    parts: Tensor = windows.unflatten(1, tuple(window)).unflatten(0, (-1, rows, columns))
    return parts.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _shift_mask(like: Tensor, size: tuple[int, int], window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """-100 where two tokens of a shifted window come from opposite edges of the map: [windows, area, area]."""
    rows, columns = (_regions(like, size[i], window[i], shift[i]) for i in range(2))
    regions = _windows((rows[:, None] * 3 + columns)[None, :, :, None], window).squeeze(-1)
    return (regions[:, :, None] != regions[:, None, :]).to(like.dtype) * -100.0


def _regions(like: Tensor, size: int, window: int, shift: int) -> Tensor:
    """The region, 0 to 2, of each place along one side; without a shift every window still lies in one region."""
    place = torch.arange(size, device=like.device)
    return (place >= size - window).long() + (place >= size - shift).long()


def without_key_bias(bias: Tensor | None) -> Tensor | None:
    """A packed bias of shape [3 * inner] with that of the keys at 0: Swin v2 learns none, as cosine similarity ignores it."""
    if bias is None:
        return None
    query, key, value = bias.chunk(3)
    return torch.cat([query, torch.zeros_like(key), value])


# ---- which heads there are, and taking some -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Kind:
    qkv: str
    """The packed projection: the Linear's name, or the prefix of `nn.MultiheadAttention`'s own parameters."""
    projection: str
    """The Linear that reads the heads' outputs."""
    count: str
    pruned: type[nn.Module]


_KINDS: dict[type[nn.Module], _Kind] = {
    nn.MultiheadAttention: _Kind("in_proj_", "out_proj", "num_heads", PrunedMultiheadAttention),
    ShiftedWindowAttention: _Kind("qkv", "proj", "num_heads", PrunedShiftedWindowAttention),
    ShiftedWindowAttentionV2: _Kind("qkv", "proj", "num_heads", PrunedShiftedWindowAttentionV2),
    RelativePositionalMultiHeadAttention: _Kind(
        "to_qkv", "merge", "n_heads", PrunedRelativePositionalMultiHeadAttention
    ),
}
_PRUNED = tuple(kind.pruned for kind in _KINDS.values())
_KINDS |= {kind.pruned: kind for kind in list(_KINDS.values())}


@dataclass(frozen=True)
class Heads:
    """The heads of one attention module."""

    count: int
    width: int
    """Channels of a head."""
    projection: str
    """Name, within the module, of the Linear that reads what the heads give."""
    refusal: str | None
    """Why none may be removed, in a user's words."""

    @property
    def channels(self) -> int:
        return self.count * self.width


def is_attention(module: nn.Module) -> bool:
    """Whether the heads of `module` are known here; subclasses of a user's own may do anything and are not."""
    return type(module) in _KINDS


def heads_of(module: nn.Module) -> Heads:
    """The heads of an attention module."""
    kind, refusal = _KINDS[type(module)], None
    if isinstance(module, nn.MultiheadAttention) and not _is_packed(module):
        refusal = "has keys or values of another size than its queries, or learned ones of its own"
        return Heads(module.num_heads, module.head_dim, kind.projection, refusal)
    count = getattr(module, kind.count)
    return Heads(count, len(_packed(module)) // 3 // count, kind.projection, refusal)


def value_rows(module: nn.Module) -> Tensor:
    """The rows of the packed weight that make the values: [heads * head width, embedding]."""
    return _packed(module).chunk(3)[2]


def keep_heads(module: nn.Module, kept: Sequence[int]) -> nn.Module:
    """An attention module with the heads `kept` of `module`, which is left as it is; other tensors are shared.

    Modes, dropout rates and requires_grad are those of `module`.
    """
    kind, heads = _KINDS[type(module)], heads_of(module)
    index = torch.tensor(list(kept), device=_packed(module).device)
    inner = (index[:, None] * heads.width + torch.arange(heads.width, device=index.device)).flatten()
    rows = torch.cat([inner + part * heads.channels for part in range(3)])
    smaller: Any = _shallow_copy(module, kind.pruned)
    setattr(smaller, kind.count, len(index))
    setattr(smaller, kind.projection, _cut(getattr(module, kind.projection), 1, inner))
    if isinstance(module, nn.MultiheadAttention):
        smaller.in_proj_weight = _selected(module.in_proj_weight, 0, rows)
        smaller.in_proj_bias = _selected(module.in_proj_bias, 0, rows)
    else:
        setattr(smaller, kind.qkv, _cut(getattr(module, kind.qkv), 0, rows))
        _cut_position_bias(smaller, module, index)
    assert isinstance(smaller, nn.Module)
    return smaller


def _cut_position_bias(smaller: Any, module: Any, index: Tensor) -> None:
    """What window attention learns for each head besides the projections."""
    if isinstance(module, ShiftedWindowAttentionV2):
        smaller.logit_scale = _selected(module.logit_scale, 0, index)
        smaller.cpb_mlp = _shallow_copy(module.cpb_mlp, type(module.cpb_mlp))
        smaller.cpb_mlp[-1] = _cut(module.cpb_mlp[-1], 0, index)
    else:
        smaller.relative_position_bias_table = _selected(module.relative_position_bias_table, 1, index)


def pruned_heads(model: nn.Module) -> dict[str, int]:
    """Name of each attention module that has lost heads -> how many it has."""
    return {name: heads_of(module).count for name, module in model.named_modules() if isinstance(module, _PRUNED)}


def give_heads(model: nn.Module, counts: Mapping[str, int]) -> None:
    """Replace, in `model`, each named attention module by one with that many heads, ready for a checkpoint's tensors.

    Raises ValueError when a name is no attention module with at least as many heads.
    """
    modules = dict(model.named_modules())
    for name, count in counts.items():
        if name not in modules or not is_attention(modules[name]) or heads_of(modules[name]).count < count:
            raise ValueError(f"{name} is no attention module with {count} heads or more")
        model.set_submodule(name, keep_heads(modules[name], range(count)))


def _is_packed(module: nn.MultiheadAttention) -> bool:
    return module._qkv_same_embed_dim and module.bias_k is None and not module.add_zero_attn


def _packed(module: nn.Module) -> Tensor:
    """Weight of the queries', keys' and values' projection, [3 * heads * head width, embedding]."""
    if isinstance(module, nn.MultiheadAttention):
        return module.in_proj_weight
    weight: Tensor = getattr(module, _KINDS[type(module)].qkv).weight
    return weight


def _cut(linear: nn.Linear, dim: int, index: Tensor) -> nn.Linear:
    """A Linear with the output (dim 0) or input (dim 1) features `index`."""
    smaller = _shallow_copy(linear, type(linear))
    smaller._parameters["weight"] = _selected(linear.weight, dim, index)
    if dim == 0:
        smaller._parameters["bias"] = _selected(linear.bias, 0, index)
    smaller.out_features, smaller.in_features = smaller.weight.shape
    return smaller


def _selected(parameter: Tensor | None, dim: int, index: Tensor) -> nn.Parameter | None:
    if parameter is None:
        return None
    return nn.Parameter(parameter.detach().index_select(dim, index), requires_grad=parameter.requires_grad)


def _shallow_copy(module: nn.Module, kind: type[_Module]) -> _Module:
    """As torch's DataParallel makes replicas: the attributes, and registries of its own for the tensors and parts."""
    copied = kind.__new__(kind)
    copied.__dict__ = {
        key: value.copy() if key in ("_parameters", "_buffers", "_modules") else value
        for key, value in module.__dict__.items()
    }
    return copied
