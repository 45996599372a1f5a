"""Data in every form that people have it: opened, split, noted, batched and augmented; or refused with a sentence."""

from __future__ import annotations

import gzip
import time

import numpy as np
import pytest
import torch
from image_files import RECIPE, encoded, fill, open_at, photo, replaced
from PIL import Image

from compress.data import dataset as data_dataset
from compress.data import fashion_mnist, images
from compress.data.batches import calibration_images, iter_batches, normalise, shift_and_flip, split_held_out
from compress.errors import DataError
from compress.preprocessing import Preprocessing

# ---- the bundled set and IDX folders ----


def test_the_bundled_set_is_balanced_padded_and_separate():
    dataset = data_dataset.open_data("fashion-mnist", Preprocessing(32, (0.286,) * 3, (0.353,) * 3), num_classes=10)
    assert dataset.kind == "labelled" and dataset.class_names == fashion_mnist.CLASS_NAMES
    assert torch.equal(dataset.test.labels.bincount(), torch.full((10,), 200))
    assert torch.equal(dataset.train.labels.bincount(), torch.full((10,), 1200))
    pixels, label = dataset.train[0]
    assert pixels.shape == (1, 32, 32) and pixels.dtype == torch.uint8 and label == int(dataset.train.labels[0])
    assert torch.equal(dataset.train.pixels[:50], replaced(dataset.train).take(torch.arange(50)))
    seen = {bytes(image.numpy()) for image in dataset.test.pixels}
    assert not any(bytes(image.numpy()) in seen for image in dataset.train.pixels)


@pytest.fixture
def idx_folder(tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("train", 40), ("test", 20)):
        fashion_mnist.write_idx(tmp_path / fashion_mnist.FILES[f"{part}_images"], rng.integers(0, 256, (count, 28, 28)))
        fashion_mnist.write_idx(tmp_path / fashion_mnist.FILES[f"{part}_labels"], np.arange(count) % 4)
    return tmp_path


def test_a_folder_of_idx_files_is_read_and_resized(idx_folder):
    dataset = open_at(idx_folder, 4)
    assert (len(dataset.train), len(dataset.test), dataset.class_names) == (40, 20, ("0", "1", "2", "3"))
    assert dataset.train[0][0].shape == (1, 24, 24)
    assert open_at(idx_folder, 4, class_names=["a", "b", "c", "d"]).class_names == ("a", "b", "c", "d")
    mapped = open_at(idx_folder, 9, class_map={"0": 8, "1": 1, "2": 2, "3": 3})
    assert mapped.train.labels[:4].tolist() == [8, 1, 2, 3] and mapped.class_names[8] == "0"
    with pytest.raises(DataError, match="has 4 class folders, but the model has 1000 outputs"):
        open_at(idx_folder, 1000)


@pytest.mark.parametrize(
    "content",
    [b"", b"no gzip", gzip.compress(b"\0\0\x08\x03\0\0"), gzip.compress(b"\0\0\x08\x01\0\0\0\x09abc")],
    ids=["empty", "no gzip", "cut off", "fewer than it says"],  # gzip writes the time into its bytes
)
def test_damaged_idx_files_are_named(idx_folder, content):
    (idx_folder / "train-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(DataError, match="train-images-idx3-ubyte.gz is not a complete IDX file"):
        open_at(idx_folder, 4)


def test_idx_parts_that_do_not_belong_together_are_refused(idx_folder):
    fashion_mnist.write_idx(idx_folder / fashion_mnist.FILES["test_labels"], np.zeros(19))
    with pytest.raises(DataError, match="The test part"):
        open_at(idx_folder, 4)


# ---- folders ----


def test_class_folders_are_split_by_class_and_seed(tmp_path):
    fill(tmp_path / "pets", {"cat": 20, "dog": 30})
    dataset = open_at(tmp_path / "pets", test_fraction=0.2)
    assert dataset.kind == "labelled" and dataset.class_names == ("cat", "dog")
    assert dataset.test.labels.bincount().tolist() == [4, 6] and dataset.train.labels.bincount().tolist() == [16, 24]
    assert set(dataset.train.positions).isdisjoint(dataset.test.positions)
    assert np.array_equal(open_at(tmp_path / "pets").test.positions, dataset.test.positions)
    assert not np.array_equal(open_at(tmp_path / "pets", seed=1).test.positions, dataset.test.positions)
    assert any("cat is output 0, dog is output 1" in note for note in dataset.notes)
    assert any("cat has only 20 images" in note for note in dataset.notes)


def test_own_parts_are_kept_and_an_unused_one_is_noted(tmp_path):
    fill(tmp_path / "train", {"cat": 12, "dog": 12})
    fill(tmp_path / "test", {"cat": 5, "dog": 5}, start=100)
    fill(tmp_path / "val", {"cat": 5, "dog": 5}, start=200)
    dataset = open_at(tmp_path)
    assert (len(dataset.train), len(dataset.test)) == (24, 10)
    assert any("val/ was not used" in note for note in dataset.notes)


def test_a_train_folder_alone_is_split(tmp_path):
    fill(tmp_path / "train", {"cat": 12, "dog": 12})
    assert (len(open_at(tmp_path).train), len(open_at(tmp_path).test)) == (20, 4)


def test_images_without_class_folders_are_unlabelled(tmp_path):
    fill(tmp_path, {".": 20})
    dataset = open_at(tmp_path)
    assert (dataset.kind, len(dataset.train), len(dataset.test)) == ("unlabelled", 16, 4)
    assert set(dataset.train.labels.tolist()) == {-1}


def test_a_root_around_the_class_folders_is_found(tmp_path):
    fill(tmp_path / "a" / "b", {"cat": 12, "dog": 12})
    assert open_at(tmp_path).class_names == ("cat", "dog")


def test_duplicates_of_test_images_leave_the_training_part(tmp_path):
    fill(tmp_path / "train", {"cat": 12, "dog": 12})
    fill(tmp_path / "test", {"cat": 5, "dog": 5}, start=100)
    (tmp_path / "train" / "dog" / "copy.bmp").write_bytes(
        encoded(Image.open(tmp_path / "test" / "dog" / "001.png"), "BMP")
    )
    dataset = open_at(tmp_path)
    assert (len(dataset.train), len(dataset.test)) == (24, 10)
    assert "1 training images that are also test images were left out of training" in dataset.notes


def test_a_few_unusable_images_are_skipped_and_listed(tmp_path):
    fill(tmp_path / "pets", {"cat": 30, "dog": 30})
    (tmp_path / "pets" / "cat" / "broken.jpg").write_bytes(encoded(photo(0), "JPEG")[:-300])
    (tmp_path / "pets" / "dog" / "moving.gif").write_bytes(encoded(photo(1), "GIF"))
    (tmp_path / "pets" / "notes.txt").write_text("hello")
    dataset = open_at(tmp_path / "pets")
    assert len(dataset.train) + len(dataset.test) == 60
    notes = " ".join(dataset.notes)
    assert (
        "2 unusable images were skipped" in notes
        and "cat/broken.jpg (damaged or cut off)" in notes
        and "dog/moving.gif" in notes
    )
    assert "1 files that are not images were ignored" in notes
    for number in range(2):
        (tmp_path / "pets" / "cat" / f"broken{number}.jpg").write_bytes(b"x")
    with pytest.raises(
        DataError, match=r"4 of 64 images in pets cannot be used, such as cat/broken.jpg \(damaged or cut off\)"
    ):
        open_at(tmp_path / "pets")


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda root: None, "There are no images in data: expected JPEG, PNG, WebP or BMP"),
        (lambda root: (root / "notes.txt").write_text("x"), "There are no images in data"),
        (lambda root: fill(root, {"cat": 12}), r"one class folder \(cat\), but a classifier needs at least 2"),
        (lambda root: fill(root, {"cat": 12, "dog": 9}), "the class dog has 9 images; at least 10 per class"),
        (
            lambda root: fill(root, {"cat": 12, "dog": 12, "owl": 12}),
            r"has 3 class folders, but the model has 2 outputs. .*such as \{\"cat\": 0, \"dog\": 1\}, .*--class-map",
        ),
        (lambda root: fill(root, {".": 3, "cat": 12}), "holds 3 images beside class folders"),
        (lambda root: fill(root, {"test/cat": 12, "test/dog": 12}), "give train/ and test/ folders"),
        (
            lambda root: fill(root, {"train/cat": 12, "train/dog": 12, "owl": 3}),
            "holds owl and train: give train/ and test/",
        ),
        (
            lambda root: fill(root, {"train/cat": 12, "train/dog": 12, "test/cow": 3}),
            r"differ \(test/cow\): give both the same",
        ),
        (lambda root: fill(root, {"1/2/3/4/5/6/7": 1}), "nested more than 6 folders deep"),
    ],
)
def test_unusable_folders_are_refused_with_what_to_do(make, words, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    make(root)
    with pytest.raises(DataError, match=words):
        open_at(root)


def test_data_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(DataError, match="There is no data at .*nowhere: give fashion-mnist, a folder, a .zip, or none"):
        open_at(tmp_path / "nowhere")


# ---- batches ----


def test_batches_are_normalised_complete_and_repeatable(tmp_path):
    fill(tmp_path, {"cat": 12, "dog": 12})
    train = open_at(tmp_path).train
    together = list(iter_batches(train, 8, shuffle=False, seed=0, preprocessing=RECIPE))
    assert [len(batch) for batch, _ in together] == [8, 8, 4]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (RECIPE.mean, RECIPE.std))
    assert torch.allclose(together[0][0][3], (train[3][0] / 255 - mean) / std, atol=1e-6)
    shuffled = [
        torch.cat([found for _, found in iter_batches(train, 8, shuffle=True, seed=seed, preprocessing=RECIPE)])
        for seed in (1, 1, 2)
    ]
    assert torch.equal(shuffled[0], shuffled[1]) and not torch.equal(shuffled[0], shuffled[2])
    assert shuffled[0].bincount().tolist() == [10, 10]


def test_decoding_batch_by_batch_gives_the_same_numbers(tmp_path, monkeypatch):
    fill(tmp_path, {"cat": 12, "dog": 12})
    kept = open_at(tmp_path).train
    monkeypatch.setattr(data_dataset, "MEMORY_BYTES", 1000)
    lazy = open_at(tmp_path).train
    assert kept.pixels is not None and lazy.pixels is None
    for (one, first), (other, second) in zip(
        *(iter_batches(part, 7, shuffle=True, seed=3, augment=True, preprocessing=RECIPE) for part in (kept, lazy)),
        strict=True,
    ):
        assert torch.equal(one, other) and torch.equal(first, second)
    (tmp_path / "cat" / "000.png").unlink()
    with pytest.raises(DataError, match="cat/000.png could be read before, but not any more"):
        list(
            iter_batches(
                data_dataset.Split(lazy.origin, np.array([0]), torch.zeros(1), RECIPE, None),
                1,
                shuffle=False,
                seed=0,
                preprocessing=RECIPE,
            )
        )


def test_another_size_is_decoded_from_the_original_image(tmp_path):
    fill(tmp_path, {"cat": 12, "dog": 12})
    train = open_at(tmp_path).train
    larger = train.take(torch.tensor([2]), RECIPE.with_input_size(30))
    original = images.decode((tmp_path / "cat" / f"{train.positions[2]:03}.png").read_bytes())
    assert torch.equal(larger[0], torch.from_numpy(images.to_pixels(images.fit(original, RECIPE.with_input_size(30)))))


def test_augmentation_shifts_and_flips_each_image_on_its_own():
    ramp = torch.arange(32, dtype=torch.uint8).view(1, 1, 1, 32).expand(64, 3, 32, 32)
    moved = shift_and_flip(ramp, torch.Generator().manual_seed(0))
    rising = moved[:, 0, 0, 20].int() > moved[:, 0, 0, 10].int()
    centres = torch.where(rising, moved[:, 0, 5, 16], moved[:, 0, 5, 15]).int() - 16
    assert 20 < rising.sum() < 44 and set(centres.tolist()) <= {-2, -1, 0, 1, 2} and len(set(centres.tolist())) == 5
    assert torch.equal(moved[:, 0], moved[:, 2])


def test_batches_are_fast_enough_for_the_training_loop():
    split = data_dataset.open_data("fashion-mnist", Preprocessing(32, (0.286,) * 3, (0.353,) * 3), num_classes=10).train
    started = time.perf_counter()
    count = sum(
        len(found)
        for _, found in iter_batches(split, 128, shuffle=True, seed=0, augment=True, preprocessing=split.preprocessing)
    )
    assert count / (time.perf_counter() - started) > 1500


def test_held_out_images_are_not_trained_on(tmp_path):
    fill(tmp_path, {"cat": 12, "dog": 12})
    train = open_at(tmp_path).train
    held_out, rest = split_held_out(train, 5, seed=0)
    assert (len(held_out), len(rest)) == (5, 15)
    assert sorted([*held_out.positions, *rest.positions]) == sorted(train.positions)
    assert torch.equal(held_out.pixels[0], train.pixels[list(train.positions).index(held_out.positions[0])])


def test_calibration_never_sees_test_images_and_is_synthetic_without_data(tmp_path):
    fill(tmp_path, {"cat": 12, "dog": 12})
    dataset = open_at(tmp_path)
    chosen = calibration_images(dataset, 100, RECIPE, seed=0)
    trained = {bytes(image.numpy()) for image in normalise(dataset.train.pixels, RECIPE)}
    assert len(chosen) == 20 and {bytes(image.numpy()) for image in chosen} == trained
    nothing = open_at("none")
    made = calibration_images(nothing, 6, RECIPE, seed=0)
    assert nothing.kind == "none" and len(nothing.train) == len(nothing.test) == 0
    assert made.shape == (6, 3, 24, 24) and made.std() > 0.3
    low, high = (normalise(torch.full((1, 3, 1, 1), value, dtype=torch.uint8), RECIPE) for value in (0, 255))
    assert (
        (made >= low).all()
        and (made <= high).all()
        and torch.equal(made, calibration_images(nothing, 6, RECIPE, seed=0))
    )
