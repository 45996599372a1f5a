"""The one training loop on a problem that a small network learns in seconds."""

import copy
import itertools

import pytest
import torch
from torch import nn

from compress.errors import TrainingError
from compress.training import TrainingConfig, fit, loss_function, one_cycle, single_pixel_convs_as_matmul
from compress.training.memory_format import Format, fastest_format


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    ).eval()


def images_and_labels(count, seed):
    """Three classes, told apart by the brightest colour channel."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=generator)
    images = torch.randn(count, 3, 8, 8, generator=generator)
    images[torch.arange(count), labels] += 1.0
    return images, labels


def batches(epoch):
    images, labels = images_and_labels(256, seed=epoch)
    yield from zip(images.split(32), labels.split(32), strict=True)


def accuracy(model):
    images, labels = images_and_labels(300, seed=999)
    with torch.no_grad():
        return float((model.eval()(images).argmax(1) == labels).float().mean())


def recipe(**changes):
    return TrainingConfig(
        **(
            {"epochs": 4, "learning_rate": 0.1, "distillation_weight": 0.0, "temperature": 4.0, "optimizer": "sgd"}
            | changes
        )
    )


@pytest.fixture(scope="module")
def teacher():
    model = network()
    fit(model, batches, 8, recipe(epochs=6))
    assert accuracy(model) > 0.9, "the problem is learnt from labels"
    return model


def test_a_student_learns_from_the_teacher_alone(teacher):
    student = network(seed=1)

    def without_labels(epoch):
        return ((images, torch.full_like(labels, -1)) for images, labels in batches(epoch))

    before = accuracy(student)
    records = fit(
        student, without_labels, 8, recipe(distillation_weight=1.0, epochs=6), teacher=teacher, score=accuracy
    )
    assert before < 0.7 < 0.9 < accuracy(student)
    assert [record["epoch"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert records[-1]["train_loss"] < records[0]["train_loss"]
    assert records[-1]["accuracy"] == pytest.approx(accuracy(student))


def test_the_teacher_is_never_changed(teacher):
    before = copy.deepcopy(teacher.state_dict())
    fit(network(seed=2), batches, 8, recipe(distillation_weight=0.5, epochs=1), teacher=teacher)
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_the_same_seed_gives_the_same_weights():
    first, second = network(), network()
    for model in (first, second):
        torch.manual_seed(5)
        fit(model, batches, 8, recipe(epochs=1))
    same = [
        torch.allclose(a, b, atol=1e-5)
        for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    ]
    assert all(same)


def test_a_fraction_of_an_epoch_stops_within_it():
    seen = itertools.count()

    def counted(epoch):
        for batch in batches(epoch):
            next(seen)
            yield batch

    records = fit(network(), counted, 8, recipe(epochs=1.5))
    assert len(records) == 2
    assert next(seen) - 1 in (12, 13), "twelve steps of a batch each, and one batch looked at to choose the format"


def test_a_loss_that_is_not_finite_is_a_clear_stop():
    with pytest.raises(
        TrainingError,
        match=r"Training diverged: the loss became nan in epoch 1, step 1, .* Try a tenth of that learning rate",
    ):
        fit(
            network(), lambda epoch: ((images * float("nan"), labels) for images, labels in batches(epoch)), 8, recipe()
        )


def test_no_batches_and_frozen_models_are_refused():
    with pytest.raises(TrainingError, match="too few training images for one batch"):
        fit(network(), batches, 0, recipe())
    with pytest.raises(TrainingError, match="Every parameter of the model is frozen"):
        fit(network().requires_grad_(False), batches, 8, recipe())


def test_the_learning_rate_rises_then_falls_to_nothing():
    rates = [one_cycle(step / 100) for step in range(101)]
    assert (
        max(rates) == pytest.approx(1.0, abs=0.07)
        and rates[0] == pytest.approx(0.1)
        and rates[-1] == pytest.approx(0.0, abs=1e-9)
    )
    assert rates.index(max(rates)) == 15


def test_the_format_is_measured_and_changes_nothing():
    model = network()
    before = copy.deepcopy(model.state_dict())
    chosen = fastest_format(model, images_and_labels(16, seed=0)[0])
    assert isinstance(chosen, Format) and str(chosen).split()[0] in ("channels_last", "contiguous")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("kernel", "stride", "bias"), [(3, 1, False), (5, 2, True)])
def test_single_pixel_convs_as_matmul_gives_the_same_answers_and_gradients(kernel, stride, bias):
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, kernel, stride=stride, padding=kernel // 2, bias=bias)
    for size in (1, 3):
        maps = torch.randn(5, 4, size, size)
        expected = layer(maps)
        expected.square().sum().backward()
        gradient = layer.weight.grad.clone()
        layer.zero_grad()
        with single_pixel_convs_as_matmul(layer):
            got = layer(maps)
            got.square().sum().backward()
        assert torch.allclose(got, expected, atol=1e-5) and torch.allclose(layer.weight.grad, gradient, atol=1e-4)
        layer.zero_grad()
    assert "forward" not in vars(layer)


def test_a_frozen_backbone_keeps_its_weights_and_its_statistics():
    model = network()
    model[:2].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    fit(model, batches, 8, recipe(epochs=1))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"5.weight", "5.bias"}


def test_zeros_are_kept_only_where_asked():
    model = network()
    with torch.no_grad():
        model[0].weight[:, 1] = 0
        model[0].bias.zero_()
    zero = model[0].weight == 0
    free = copy.deepcopy(model)
    fit(model, batches, 8, recipe(epochs=1), keep_zeros=True)
    fit(free, batches, 8, recipe(epochs=1))
    assert torch.equal(model[0].weight == 0, zero) and bool((model[0].bias != 0).all())
    assert not (free[0].weight == 0).any()


def test_the_loss_for_other_loops_is_the_loss_of_fit(teacher):
    model, (images, labels) = network(), next(iter(batches(0)))
    loss = loss_function(recipe(distillation_weight=0.25, temperature=2.0), teacher)(model, images, labels)
    logits, target = model(images), teacher(images)
    entropy = nn.functional.cross_entropy(logits, labels)
    divergence = (target / 2).softmax(1) * ((target / 2).log_softmax(1) - (logits / 2).log_softmax(1))
    assert loss.item() == pytest.approx((0.75 * entropy + 0.25 * 4 * divergence.sum(1).mean()).item(), rel=1e-5)
