"""Answers of torch models on images of any size."""

import numpy as np
import pytest
import torch
from torch import nn

from compress.equality.outputs import PIXELS_AT_ONCE, torch_answer


class Noting(nn.Module):
    """Answers each image with its mean, and notes how many come at once."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, images):
        self.seen.append(len(images))
        return images.mean((2, 3))


@pytest.mark.parametrize("size, at_once", [(32, 20), (224, 4), (512, 1)])
def test_large_images_go_through_a_model_few_at_a_time_and_in_order(size, at_once):
    images = np.random.default_rng(0).random((20, 3, size, size), np.float32)
    model = Noting()
    answers = torch_answer(model)(images)
    np.testing.assert_allclose(answers, images.mean((2, 3)), rtol=1e-4)
    assert max(model.seen) == at_once and sum(model.seen) == 20
    assert at_once * size * size <= max(PIXELS_AT_ONCE, size * size)


def test_answers_come_without_gradients_in_eval_mode():
    layer = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(12, 2)).train()
    images = np.ones((3, 3, 2, 2), np.float32)
    answers = torch_answer(layer)(images)
    assert not layer.training and answers.dtype == np.float32
    np.testing.assert_array_equal(answers, layer(torch.from_numpy(images)).detach().numpy())
