"""Every pruner on NNI's list: what it does, what it needs, what it costs, which paper it is from."""

from __future__ import annotations

from dataclasses import dataclass

NOTHING, LOOKS, TRAINS = "nothing", "training images", "training images, and trains on them"


@dataclass(frozen=True)
class Pruner:
    """A way to choose what goes."""

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
    leaves_trained: bool = False
    """Whether the result carries the weights that were trained while pruning; else those the model came with."""
    fine_grained: bool = False
    """Whether single weights become zero, so that no layer gets smaller."""

    @property
    def needs_images(self) -> bool:
        return self.needs_data != NOTHING


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
    ),
    Pruner(
        "activation-apoz",
        "Zeros after the activation",
        "Removes the channels that are most often not positive after the activation function (for ReLU: zero).",
        LOOKS,
        "--pruning-epochs of forward passes",
        "Hu et al., Network Trimming, arXiv:1607.03250",
        "Pruner",
    ),
    Pruner(
        "activation-mean",
        "Mean activation",
        "Removes the channels whose mean absolute value after the activation function is smallest.",
        LOOKS,
        "--pruning-epochs of forward passes",
        "Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient Inference, arXiv:1611.06440",
        "Pruner",
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
    ),
)


def _registry(*pruners: Pruner) -> dict[str, Pruner]:
    names = [pruner.name for pruner in pruners]
    if len(set(names)) != len(names):
        raise ValueError(f"two pruners share a name: {names}")
    return {pruner.name: pruner for pruner in pruners}


PRUNERS: dict[str, Pruner] = _registry(*_WEIGHTS, *_LOOKING, *_TRAINING)

SEARCHES: dict[str, Search] = {
    search.name: search
    for search in (
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
}
"""Strategies of the target search; a request that names one as its pruner is refused."""
