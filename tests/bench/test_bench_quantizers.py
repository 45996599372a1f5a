"""The page of the quantizer table says what its rows say."""

from bench.quantized_models import lines_of
from bench.quantizers import Row, requests, table
from compress.methods.quantizers import QUANTIZERS


def test_every_quantizer_has_a_request_at_both_widths():
    asked = [(r.quantizer, r.weight_bits, r.activation_bits) for r in requests(list(QUANTIZERS), [8, 4])]
    assert set(asked) == {
        ("qat", 8, 8), ("ptq", 8, 8), ("lsq", 8, 8), ("lsq-plus", 8, 8), ("dorefa", 7, 8), ("bnn", 1, 8),
        ("qat", 4, 4), ("ptq", 4, 4), ("lsq", 4, 4), ("lsq-plus", 4, 4), ("dorefa", 4, 4), ("bnn", 1, 4),
    }  # fmt: skip
    assert asked.count(("ptq", 8, 8)) == 5, "one for each calibration"


def test_the_table_has_a_row_and_a_paper_for_each_quantizer():
    rows = [
        Row("qat", "average", 8, 8, 0.91, 0.92, 0.999, 21, 21, 30.2),
        Row("ptq", "mse", 4, 4, 0.5, None, 1, 20, 21, 3),
    ]
    request = next(requests(["qat"], [8], qat_epochs=0.5, qat_learning_rate=1e-4))
    text = table(rows, 0.925, request, 2000, 9500)
    assert "| `qat` | average | 8 / 8 | 91.0 % | 92.0 % | 99.90 % | 21 of 21 | 30 |" in text
    assert "| `ptq` | mse | 4 / 4 | 50.0 % | does not train | 100.00 % | 20 of 21 | 3 |" in text
    assert "0.5 x 9,500 images at a peak learning rate of 0.0001" in text and "https://arxiv.org/abs/1712.05877" in text


def test_a_dense_model_has_a_line_for_each_quantizer():
    calibrated = Row("ptq", "average", 8, 8, 0.9, None, 0.999, 53, 54, 1.0)
    trained = Row("qat", "average", 4, 8, 0.5, 0.915, 1.0, 54, 54, 1.0)
    assert lines_of("resnet50", 0.92, [calibrated, trained]) == [
        "| resnet50 | 92.0 % | `ptq` | 8 / 8 | 90.0 % | -2.0 | 99.90 % | 53 of 54 |",
        "| resnet50 | 92.0 % | `qat` | 4 / 8 | 91.5 % | -0.5 | 100.00 % | 54 of 54 |",
    ]
