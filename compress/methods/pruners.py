"""The registry of pruners, and of the search strategies on NNI's list of pruners: what each does and what it needs.

Every other list of their names is derived from it: the request, the command line, the web form and the documentation. A
pruner of NNI's that needs only the weights is one entry; one that needs images names, in `function`, the function of
`compress.pruning.nni` that chooses the channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

NOTHING, LOOKS, TRAINS = "nothing", "training images", "training images, and trains on them"


Method = TypeVar("Method", "Pruner", "Search")


def _registry(methods: Iterable[Method]) -> dict[str, Method]:
    """Name -> method, in this order; raises `ValueError` where two have the same name."""
    entries: dict[str, Method] = {}
    for method in methods:
        if method.name in entries:
            raise ValueError(f"Two methods are called {method.name}; give one of them another name.")
        entries[method.name] = method
    return entries


# ---- pruners ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pruner:
    """A way to choose the channels, or the single weights, that are removed."""

    name: str
    """Key into PRUNERS, as written in a request."""
    title: str
    summary: str
    """What it does, in one line."""
    needs_data: str
    """What it needs besides the weights: NOTHING, LOOKS or TRAINS."""
    cost: str
    paper: str
    nni_class: str
    """Name of the class of NNI 3.0 that chooses, or that the pruner is built on."""
    function: str = ""
    """Such as trained.taylor: module and function in `compress.pruning.nni` that choose with images, called with (model,
    example, plan, training, pruner); empty where `nni_class` chooses by the weights alone."""
    leaves_trained: bool = False
    """Whether the result has the weights that were trained while pruning; else the original ones."""
    fine_grained: bool = False
    """Whether single weights become zero, so that no layer gets smaller."""
    needs_batch_norm: bool = False
    """Whether it ranks by BatchNorm factors, so that a model without any cannot be pruned by it."""

    @property
    def needs_images(self) -> bool:
        return self.needs_data != NOTHING

    @property
    def trains(self) -> bool:
        return self.needs_data == TRAINS


_TRAINED = "--pruning-epochs of training"

_WEIGHTS = (
    Pruner(
        "l1-norm",
        "L1 norm",
        "Removes the channels whose weights have the smallest sum of absolute values.",
        NOTHING,
        "under a second",
        "Li et al., Pruning Filters for Efficient ConvNets, arXiv:1608.08710",
        "L1NormPruner",
    ),
    Pruner(
        "l2-norm",
        "L2 norm",
        "Removes the channels whose weights have the smallest Euclidean norm.",
        NOTHING,
        "under a second",
        "Li et al., Pruning Filters for Efficient ConvNets, arXiv:1608.08710",
        "L2NormPruner",
    ),
    Pruner(
        "fpgm",
        "Geometric median",
        "Removes the channels nearest to all others, which the others can replace.",
        NOTHING,
        "seconds for wide layers",
        "He et al., Filter Pruning via Geometric Median, CVPR 2019, arXiv:1811.00250",
        "FPGMPruner",
    ),
    Pruner(
        "level",
        "Level (single weights)",
        "Sets the smallest single weights to zero and keeps them zero; no layer gets smaller or faster.",
        NOTHING,
        "under a second",
        "Han et al., Learning both Weights and Connections for Efficient Neural Networks, arXiv:1506.02626",
        "LevelPruner",
        fine_grained=True,
    ),
)

_LOOKING = (
    Pruner(
        "taylor",
        "Taylor",
        "Removes the channels whose loss would change least, by the squared product of weight and gradient.",
        LOOKS,
        "--pruning-epochs of gradients",
        "Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019, arXiv:1906.10771",
        "TaylorPruner",
        function="trained.taylor",
    ),
    Pruner(
        "activation-apoz",
        "Zeros after the activation",
        "Removes the channels that are most often not positive after the activation function (for ReLU: zero).",
        LOOKS,
        "--pruning-epochs of forward passes",
        "Hu et al., Network Trimming, arXiv:1607.03250",
        "Pruner",
        function="data_driven.by_activation",
    ),
    Pruner(
        "activation-mean",
        "Mean activation",
        "Removes the channels whose mean absolute value after the activation function is smallest.",
        LOOKS,
        "--pruning-epochs of forward passes",
        "Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient Inference, arXiv:1611.06440",
        "Pruner",
        function="data_driven.by_activation",
    ),
)

_TRAINING = (
    Pruner(
        "slim",
        "Network slimming",
        "Trains with an L1 penalty on BatchNorm factors and removes the channels with the smallest; layers that share "
        "channels and have no BatchNorm go by their L1 norm.",
        TRAINS,
        _TRAINED,
        "Liu et al., Learning Efficient Convolutional Networks through Network Slimming, arXiv:1708.06519",
        "SlimPruner",
        function="trained.slim",
        needs_batch_norm=True,
        leaves_trained=True,
    ),
    Pruner(
        "linear",
        "Linear schedule",
        "Prunes by L1 norm in equal steps and trains in between.",
        TRAINS,
        _TRAINED,
        "NNI 3.0, LinearPruner over L1NormPruner",
        "LinearPruner",
        function="trained.gradual",
        leaves_trained=True,
    ),
    Pruner(
        "agp",
        "Automated gradual pruning",
        "Prunes by L1 norm in steps that become smaller and trains in between.",
        TRAINS,
        _TRAINED,
        "Zhu and Gupta, To Prune, or Not to Prune, arXiv:1710.01878",
        "AGPPruner",
        function="trained.gradual",
        leaves_trained=True,
    ),
    Pruner(
        "movement",
        "Movement",
        "Removes the channels whose weights move towards zero while training.",
        TRAINS,
        _TRAINED,
        "Sanh et al., Movement Pruning, arXiv:2005.07683",
        "MovementPruner",
        function="trained.movement",
        leaves_trained=True,
    ),
    Pruner(
        "admm",
        "ADMM",
        "Trains with a pull towards the nearest pruned model, then removes the channels of smallest Euclidean norm.",
        TRAINS,
        _TRAINED,
        "Zhang et al., A Systematic DNN Weight Pruning Framework using ADMM, arXiv:1804.03294",
        "Pruner",
        function="data_driven.admm",
        leaves_trained=True,
    ),
    Pruner(
        "lottery-ticket",
        "Lottery ticket",
        "Trains, prunes some channels by L1 norm, puts the original weights back, and repeats.",
        TRAINS,
        _TRAINED,
        "Frankle and Carbin, The Lottery Ticket Hypothesis, arXiv:1803.03635",
        "ScheduledPruner",
        function="data_driven.lottery_ticket",
    ),
)

PRUNERS: dict[str, Pruner] = _registry((*_WEIGHTS, *_LOOKING, *_TRAINING))

# ---- searches -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Search:
    """A pruner of NNI's list that searches how much to remove from each layer."""

    name: str
    title: str
    summary: str
    paper: str

    @property
    def command(self) -> str:
        """What does it, in the shell."""
        return f"python -m compress search --strategy {self.name}"


SEARCHES: dict[str, Search] = _registry(
    (
        Search(
            "simulated-annealing",
            "Simulated annealing",
            "Searches a ratio for each layer by simulated annealing.",
            "Liu et al., AutoCompress, AAAI 2020, arXiv:1907.03141",
        ),
        Search(
            "auto-compress",
            "AutoCompress",
            "Simulated annealing and ADMM in turn.",
            "Liu et al., AutoCompress, AAAI 2020, arXiv:1907.03141",
        ),
        Search(
            "amc",
            "AMC",
            "Lets a reinforcement-learning agent choose a ratio for each layer.",
            "He et al., AMC: AutoML for Model Compression, ECCV 2018, arXiv:1802.03494",
        ),
    )
)
"""Strategies of the target search; a request that names one as its pruner is refused."""
