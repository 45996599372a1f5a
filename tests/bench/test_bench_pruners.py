"""The page of the pruner table says what its rows say."""

import compress
from bench.pruners import Row, table


def test_the_table_has_a_row_and_a_paper_for_each_pruner():
    rows = [Row("l1-norm", 0.5, 0.9, 2_800_000, 3.2, 60.4), Row("agp", 0.8, 0.912, 2_800_000, 50.0, 61.0)]
    text = table(rows, 0.93, compress.Request(finetune_epochs=1), 10_000)
    assert "50 % removed, then fine-tuning for 1 x 10,000 training images" in text
    assert "pruners that look at images or train had 0.5 x as many" in text and "93.0 %" in text
    assert "| nothing | 50.0 % | 90.0 % | 2.80 M | 3 | 60 |" in text
    assert "| `agp` |" in text and "- `agp`: Zhu and Gupta" in text
