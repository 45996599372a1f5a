"""The committed example requests are what they say, and run."""

import pytest
from image_files import encoded, photo
from places import ROOT

import compress

EXAMPLES = sorted((ROOT / "examples").glob("*.json"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_a_valid_request(path):
    assert compress.Request.from_file(path).model


@pytest.mark.slow  # 57 million parameters
def test_nnis_tutorial_runs_on_images_of_ones_own_at_a_size_that_ci_can_bear(tmp_path):
    asked = compress.Request.from_file(ROOT / "examples" / "alexnet-512.json")
    assert (asked.input_size, asked.batch_size, asked.optimizer, asked.finetune_epochs) == (512, 32, "sgd", 3)
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(70):
        (folder / f"{number}.png").write_bytes(encoded(photo(number)))
    values = asked.model_dump() | {"input_size": 64, "data": str(folder)}
    report = compress.run(compress.Request(**values), out=tmp_path / "run")
    assert report.variant("quantized").parameters < 0.3 * report.variant("baseline").parameters
    assert [row.epoch for row in report.curves if row.stage == "finetune"] == [1, 2, 3]
    bits = {layer.name: layer.weight_bits for layer in report.layers}
    assert {name: bits[name] for name in ("features.0", "features.10", "classifier.1", "classifier.6")} == {
        "features.0": 8, "features.10": 8, "classifier.1": 32, "classifier.6": 32,
    }  # fmt: skip
    assert (tmp_path / "run" / "artifacts" / "quantization.json").is_file(), "the calibration config"
    assert all(row.passed for row in report.handoffs)
