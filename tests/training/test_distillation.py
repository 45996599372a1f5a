"""The teacher answers once for each image that always looks the same, and its answers are those of the model."""

import gc

import pytest
import torch
from torch import nn

from compress.training import TrainingConfig, distillation, fit
from compress.training.distillation import Teacher

CPU = torch.device("cpu")


class Counted(nn.Module):
    """Three classes from the mean of each channel; counts the images it was asked about."""

    asked = 0

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, images):
        Counted.asked += len(images)
        return self.linear(images.mean((2, 3)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    Counted.asked = 0
    return Counted()


def images(count, seed=0):
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def test_a_numbered_image_is_asked_about_once(model):
    teacher, pixels = Teacher(model, CPU), images(6)
    first = teacher(pixels[:4], torch.tensor([0, 1, 2, 3]))
    mixed = teacher(pixels[[5, 3, 0]], torch.tensor([5, 3, 0]))
    assert Counted.asked == 5, "four, and number 5"
    assert torch.equal(mixed[1:], first[[3, 0]])
    assert torch.allclose(mixed, model(pixels[[5, 3, 0]]))
    assert not mixed.requires_grad


def test_images_without_numbers_are_asked_about_every_time(model):
    teacher = Teacher(model, CPU)
    for _ in range(3):
        assert torch.allclose(teacher(images(4)), model(images(4)))
    assert Counted.asked == 3 * 4 * 2


def test_what_does_not_fit_is_asked_about_again(model, monkeypatch):
    monkeypatch.setattr(distillation, "MOST_REMEMBERED_BYTES", 2 * 3 * 4)  # two answers of three float32
    teacher, numbers = Teacher(model, CPU), torch.arange(4)
    first, second = teacher(images(4), numbers), teacher(images(4), numbers)
    assert Counted.asked == 4 + 2
    assert torch.allclose(first, second)


def test_an_image_that_comes_twice_in_a_batch_is_remembered_once(model, monkeypatch):
    monkeypatch.setattr(distillation, "MOST_REMEMBERED_BYTES", 2 * 3 * 4)
    teacher, pixels = Teacher(model, CPU), images(2)[[0, 0, 1]]
    first = teacher(pixels, torch.tensor([7, 7, 3]))
    again = teacher(pixels, torch.tensor([7, 7, 3]))
    assert Counted.asked == 3 and torch.equal(first, again)


def test_remembered_answers_take_no_more_than_their_bytes(model):
    def tensors():
        return sum(type(thing) is torch.Tensor for thing in gc.get_objects())

    teacher, numbers = Teacher(model, CPU), torch.arange(200)
    before = tensors()
    answers = teacher(images(200), numbers)
    assert tensors() - before < 10, "a tensor takes more than the three numbers that it would hold"
    answers.zero_()
    assert torch.allclose(teacher(images(200), numbers), model(images(200))), "what was handed out is no view"


def test_training_with_remembered_answers_gives_the_same_student(model):
    pixels = images(64)

    def batches(numbered):
        def epoch_batches(epoch):
            order = torch.randperm(64, generator=torch.Generator().manual_seed(epoch))
            for chosen in order.split(16):
                yield (pixels[chosen], torch.zeros_like(chosen), chosen)[: 3 if numbered else 2]

        return epoch_batches

    students, asked = [], []
    for numbered in (True, False):
        torch.manual_seed(1)
        student, Counted.asked = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), 0
        fit(student, batches(numbered), 4, TrainingConfig(3, 0.01, 1.0, 4.0), teacher=model)
        students.append(student[1].weight)
        asked.append(Counted.asked)
    assert asked == [64, 3 * 64]
    assert torch.allclose(*students, atol=1e-6)
