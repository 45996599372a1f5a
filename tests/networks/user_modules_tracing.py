"""Small networks with the ordinary code that people write in forward passes, one for each habit."""

from __future__ import annotations

import math
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BODIES: dict[str, Callable[[Net, Tensor], object]] = {}
REFUSED: dict[str, tuple[Callable[[Net, Tensor], object], str]] = {}
Answer = namedtuple("Answer", "logits features")


class MyConv(nn.Conv2d):
    """Inherits and changes nothing."""

    def extra_repr(self) -> str:
        return "mine"


class MyNorm(nn.BatchNorm2d):
    pass


class SamePad(nn.Conv2d):
    """Pads as TensorFlow does, by the size of what it gets."""

    def forward(self, x: Tensor) -> Tensor:
        pads = [max((math.ceil(size / 2) - 1) * 2 + 3 - size, 0) for size in x.shape[-2:]]
        if any(pad > 0 for pad in pads):
            x = F.pad(x, [pads[1] // 2, pads[1] - pads[1] // 2, pads[0] // 2, pads[0] - pads[0] // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class NormAct(nn.BatchNorm2d):
    """A BatchNorm with its activation."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return self.act(x)


class Standardised(nn.Conv2d):
    """Its weight is computed anew each time, so it is no plain convolution."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (x.sigmoid() * (1 + x * (1 - x.sigmoid())))


@dataclass
class Record:
    logits: Tensor
    features: Tensor | None = None


class Net(nn.Module):
    """A stem, a body of somebody's and a head."""

    def __init__(self, body: Callable[[Net, Tensor], object]) -> None:
        super().__init__()
        self.body = body
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.conv, self.norm = nn.Conv2d(32, 32, 3, 1, 1), nn.BatchNorm2d(32)
        self.mine, self.my_norm = MyConv(32, 32, 3, 1, 1), MyNorm(32)
        self.same, self.norm_act, self.odd = SamePad(32, 32, 3, 2), NormAct(32), Standardised(32, 32, 3, 1, 1)
        self.quarter = nn.ModuleList(nn.Conv2d(8, 8, 3, 1, 1) for _ in range(3))
        self.head = nn.Linear(32, 4)
        self.hidden = [nn.Conv2d(32, 32, 1)]
        self.register_buffer("mean", torch.full((3, 1, 1), 0.5))
        self.register_buffer("calls", torch.zeros(()))
        self.seen: Tensor | None = None

    def forward(self, x: Tensor, return_features: bool = False, mask: Tensor | None = None, *extra, **more) -> object:
        answer = self.body(self, x if mask is None else x * mask)
        return (answer, x) if return_features else answer

    def end(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


def body(function: Callable[[Net, Tensor], object]) -> Callable[[Net, Tensor], object]:
    BODIES[function.__name__] = function
    return function


def refused(text: str) -> Callable[[Callable[[Net, Tensor], object]], None]:
    def register(function: Callable[[Net, Tensor], object]) -> None:
        REFUSED[function.__name__] = (function, text)

    return register


@body
def flags_of_a_shape(net, x):
    if x.dim() != 4 or x.shape[1] > 3 or not torch.is_tensor(x) or x.dtype != torch.float32:
        raise ValueError("images, please")
    return net.end(net.stem(x))


@body
def checks(net, x):
    assert x.size(1) == 3, f"{x.shape} has no colours"
    assert isinstance(x, torch.Tensor) and x.ndim == 4 and len(x.shape) == 4
    torch._assert(x.shape[2] % 2 == 0, "even")
    return net.end(net.stem(x))


@body
def unpacked_sizes(net, x):
    x = net.stem(x)
    b, c, h, w = x.shape
    x = x.view(b, c, h * w).permute(0, 2, 1).reshape(-1, h, w, c).permute(0, 3, 1, 2)
    return net.end(x)


@body
def sizes_as_numbers(net, x):
    x = net.stem(x)
    return net.end(x.view(int(x.size(0)), int(x.shape[1]), -1).view(x.shape))


@body
def twice_the_batch(net, x):
    x = net.stem(torch.cat([x, x.flip(3)]))
    count = int(x.shape[0])
    return net.end(x.view([count // 2, 2, *x.shape[1:]]).sum(1))


@body
def loop_over_chunks(net, x):
    first, *others = net.stem(x).chunk(4, 1)
    results = [first]
    for part, conv in zip(others, net.quarter, strict=True):
        results.append(conv(part + results[-1]))
    return net.end(torch.cat(results, 1))


@body
def loop_over_a_split(net, x):
    parts = torch.split(net.stem(x), [8, 24], dim=1)
    assert len(parts) == 2
    return net.end(torch.cat([net.quarter[0](parts[0]), *parts[1:]], dim=1))


@body
def loop_over_columns(net, x):
    x = net.stem(x)
    for shift in range(min(x.size(3), 2)):
        x = x + torch.roll(x, shift, 3)
    return net.end(x)


@body
def branch_by_size(net, x):
    x = net.stem(x)
    return net.end(F.max_pool2d(x, 2) if x.shape[-1] > 8 else x)


@body
def subclasses(net, x):
    return net.end(net.my_norm(net.mine(net.stem(x))).relu())


@body
def padding_of_its_own(net, x):
    return net.end(net.norm(net.same(net.stem(x))))


@body
def activation_of_its_own(net, x):
    return net.end(net.norm_act(net.mine(net.stem(x))))


@body
def weight_of_its_own(net, x):
    return net.end(net.norm(net.odd(net.stem(x))).relu())


@body
def assignment(net, x):
    x = net.stem(x)
    out = torch.zeros(x.shape, device=x.device, dtype=x.dtype)
    out[:, :, ::2] = x[:, :, ::2]
    return net.end(out + x)


@body
def statement_in_place(net, x):
    identity = x = net.stem(x)
    x += 1
    return net.end(identity + x)


@body
def positions(net, x):
    x = net.stem(x)
    place = torch.arange(x.shape[-1], device=x.device, dtype=x.dtype) / x.shape[-1]
    return net.end(x + place[None, None, None])


@body
def scaled_by_a_root(net, x):
    x = net.stem(x)
    return net.end(x * (x.shape[1] ** -0.5) / math.sqrt(x.size(-1)))


@body
def modules_made_on_the_way(net, x):
    return net.end(nn.Hardswish()(net.stem(x)))


@body
def function_of_its_own(net, x):
    return net.end(Swish.apply(net.stem(x)))


@body
def normalises_by_a_buffer(net, x):
    return net.end(net.stem((x - net.mean) / net.mean))


@body
def remembers(net, x):
    net.calls += 1
    net.seen = net.stem(x)
    return net.end(net.seen)


@body
def loop_with_none(net, x):
    state = None
    for _ in range(2):
        state = net.stem(x) if state is None else net.conv(state)
    return net.head(state.flatten(2).mean(-1))


@body
def answers_a_dictionary(net, x):
    return OrderedDict(logits=net.end(net.stem(x)))


@body
def answers_a_named_tuple(net, x):
    x = net.stem(x)
    return Answer(net.end(x), x)


@body
def answers_a_record(net, x):
    return Record(net.end(net.stem(x)))


@refused("chooses its way by the values of its input, at user_modules_tracing.py, line .*`if x.max")
def branch_by_values(net, x):
    if x.max() > 1:
        x = x / 255
    return net.end(net.stem(x))


@refused("chooses its way by the values of its input, at .*`scale = x.std")
def number_of_a_tensor(net, x):
    scale = x.std().item()
    return net.end(net.stem(x / scale))


@refused("makes a tensor whose size depends on the values of its input.*, at .*nonzero")
def nonzero(net, x):
    return net.end(net.stem(x)) + x.nonzero().sum()


@refused("makes a tensor whose size depends on the values of its input.*, at .*mean")
def masked(net, x):
    return net.end(net.stem(x)) + x[x > 0.5].mean()


@refused("does something else for another number of images at once; let it treat each image alone, at .*`for")
def loop_over_images(net, x):
    rows = []
    for image in x:
        rows.append(net.end(net.stem(image[None])))
    return torch.cat(rows)


@refused(r"refuses its input: its own check failed \(built for 40 pixels\), at .*`assert x.shape")
def own_check(net, x):
    assert x.shape[2] == 40, "built for 40 pixels"
    return net.end(net.stem(x))


@refused("answers the same image differently each time, even in evaluation, because dropout.* is random there; give it "
         "training=self.training, at .*`return net.end")  # fmt: skip
def dropout_without_a_flag(net, x):
    return net.end(F.dropout(net.stem(x), 0.3))


@refused(r".* because randn_like\(\) is random there; use it while self.training is set only")
def noise(net, x):
    return net.end(net.stem(x + torch.randn_like(x)))


@refused("calls a Conv2d that it keeps where torch does not find it")
def layer_in_a_list(net, x):
    return net.end(net.hidden[0](net.stem(x)))


@refused("does not run on images of 3 x 32 x 32: .*, at .*`return net.head")
def wrong_width(net, x):
    return net.head(net.stem(x).flatten(1).unflatten(1, (31, -1)))


@refused("looks something up by a size of its input")
def cached_by_size(net, x):
    cache = {16: 1.0}
    x = net.stem(x)
    return net.end(x * cache.get(x.shape[-1], 2.0))
