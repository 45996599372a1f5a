"""The output of a user's module: the logits in it, and outputs that are refused because they are none or random."""

from __future__ import annotations

import re

import pytest
import torch
from opening import IMAGES, answer, opened, refusal
from torch import fx, nn
from user_classifiers import ANSWERS, CLASSES, WIDTH, Answering, Net, trained_values

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:torch.quantize")


# ---- random answers ----


class Random(Net):
    def __init__(self, end) -> None:
        super().__init__()
        self.end = end

    def forward(self, x):
        return self.end(super().forward(x))


@pytest.mark.parametrize(
    ("end", "pattern"),
    [
        (
            lambda z: nn.functional.dropout(z, 0.3),
            r"dropout\(\) is random at .*, in <lambda>: `.*`: give it training=self.training\.$",
        ),
        (
            lambda z: z + torch.randn_like(z),
            r"randn_like\(\) is random at .*: use it while self.training is set only\.$",
        ),
    ],
)
def test_a_module_that_answers_at_random_is_refused_with_the_line(end, pattern):
    text = refusal(Random(end))
    assert "expected a module that answers the same image alike each time, in evaluation, and " in text
    assert re.search(pattern, text), text


def test_random_numbers_that_change_no_answer_are_no_fault():
    model = Random(lambda z: z + 0 * torch.rand(1)).eval()
    torch.testing.assert_close(answer(opened(model).model), answer(model))


# ---- answers ----


def plain_logits(net: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return net.head(net.features(IMAGES))


@pytest.mark.parametrize("name", ANSWERS)
def test_the_logits_are_found_in_what_the_module_answers_with(name):
    net = trained_values(Answering(ANSWERS[name]))
    opening = opened(net)
    assert torch.equal(answer(opening.model), plain_logits(net)) and opening.num_classes == CLASSES
    assert opening.notes and [key for key, _ in opening.model.named_modules()] == [key for key, _ in net.named_modules()]
    assert isinstance(opening.model, Answering) and type(opening.model).__qualname__ == "Answering"


def test_the_note_says_which_part_of_the_answer_is_taken():
    notes = opened(Answering(ANSWERS["a dictionary with features"])).notes
    assert notes == ("The module answers with a dict: the logits are answer['logits'], and the rest is left out.",)


def test_another_answer_in_training_mode_stays_as_it_is():
    class Training(Answering):
        def forward(self, x):
            return [self.head(self.features(x))] * 2 if self.training else super().forward(x)

    model = opened(Training(ANSWERS["a dictionary"])).model
    assert isinstance(model.train()(IMAGES), list) and isinstance(model.eval()(IMAGES), torch.Tensor)


def test_a_graph_module_that_answers_with_a_dictionary():
    net = trained_values(Answering(ANSWERS["a dictionary with features"]))
    opening = opened(fx.symbolic_trace(net))
    assert torch.equal(answer(opening.model), plain_logits(net)) and opening.notes


@pytest.mark.parametrize(
    ("pack", "sentence"),
    [
        (
            lambda z, f: (z, f),
            "it answered a tuple: answer[0] of shape [N, 4], answer[1] of shape [N, 32]; of several answers",
        ),
        (
            lambda z, f: {"a": z, "b": z + 1},
            "a dict: answer['a'] of shape [N, 4], answer['b'] of shape [N, 4]; of several",
        ),
        (lambda z, f: None, "it answered nothing (None)"),
        (lambda z, f: {"loss": None}, "it answered a dict without tensors"),
        (lambda z, f: z[:, :, None, None].expand(-1, -1, 8, 8), "it answered a tensor of shape [N, 4, 8, 8]"),
        (lambda z, f: z[:, None].expand(-1, 7, -1), "it answered a tensor of shape [N, 7, 4]"),
        (lambda z, f: z.argmax(1), "it answered int64 numbers ([N]): return the scores, before argmax"),
        (lambda z, f: z * float("nan"), "its scores for an image of random pixels are NaN"),
        (lambda z, f: z.sigmoid(), "its forward ends in a sigmoid: return the 4 logits, without the sigmoid"),
        (lambda z, f: {"labels": z.sigmoid_().view(-1, 4)}, "its forward ends in a sigmoid"),
        (
            lambda z, f: z.mean(1),
            "return two, 0 and the score z [N, 1] before its sigmoid: torch.cat([torch.zeros_like(z), z]",
        ),
    ],
)
def test_other_answers_are_refused_with_what_to_return(pack, sentence):
    assert sentence in refusal(trained_values(Answering(pack)))


@pytest.mark.parametrize("end", [lambda z: z.softmax(1), lambda z: z.log_softmax(1), lambda z: z * z.sigmoid()])
def test_other_ends_than_a_sigmoid_are_scores(end):
    assert opened(Answering(lambda z, f: end(z))).num_classes == CLASSES


@pytest.mark.parametrize(
    "end", [lambda z: z, lambda z: z.squeeze(1), lambda z: z.sigmoid(), lambda z: {"p": z.sigmoid()}]
)
def test_the_recipe_for_two_logits_gives_the_same_probability(end):
    class Binary(Net):
        def forward(self, x):
            return end(super().forward(x))

    net = trained_values(Binary(classes=1))
    text = refusal(net)
    assert "give `head` two outputs, the first of them 0" in text and f"two = torch.nn.Linear({WIDTH}, 2)" in text
    recipe = text.partition("torch.nn.functional.pad: ")[2].partition("; softmax")[0]
    names = {"torch": torch, "old": net.head, "pad": nn.functional.pad}
    exec(recipe, names)  # noqa: S102 - as the reader would
    with torch.no_grad():
        features = net.features(IMAGES)
        assert torch.allclose(names["two"](features).softmax(1)[:, 1:], net.head(features).sigmoid())
