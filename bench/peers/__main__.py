"""The same checkpoints compressed by others and by Espalier, on the same runtimes: `docs/benchmarks.md` and `.json`.

    python -m bench.peers [--data FOLDER] [--models resnet18 mobilenet_v2] [--images 60000] [--only ROW ...]

FOLDER holds the four idx.gz files of Fashion-MNIST; without it the bundled part is used. The peers are installed below
build/peers, each in its own environment. `--images` counts training images after pruning. What is finished below `--out`,
in a folder for each model, number of images and FOLDER, is kept, so an interrupted benchmark goes on; rows that failed are
tried again with `--retry`. The page tells of the rows that are there. It takes hours, and nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bench import made_on
from bench.accuracy import RECIPE
from bench.peers import study, table
from bench.peers.rows import OURS, ROWS
from compress.data import dataset as data_dataset
from compress.files import write_text
from compress.workload import DEMO_DATA


def arguments() -> argparse.Namespace:
    names = [row.name for row in ROWS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=DEMO_DATA, help="a folder with the four files of Fashion-MNIST")
    parser.add_argument("--models", nargs="+", default=["resnet18", "mobilenet_v2"])
    parser.add_argument("--images", type=int, default=60_000, help="training images after pruning")
    parser.add_argument("--only", nargs="+", default=names, choices=names, metavar="ROW", help=", ".join(names))
    parser.add_argument("--retry", action="store_true", help="try rows again that failed")
    parser.add_argument("--environments", type=Path, default=Path("build/peers"))
    parser.add_argument("--out", type=Path, default=Path("runs/bench-peers"))
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks.md"))
    return parser.parse_args()


def main() -> None:
    options = arguments()
    asked = dict.fromkeys(row.environment for row in ROWS if row.name in options.only)
    made = {name: study.Environment.prepared(name, options.environments.resolve()) for name in asked}
    dataset = data_dataset.open_data(options.data, RECIPE, num_classes=10)
    models = []
    for name in options.models:
        folder = study.folder_of(options.out, name, options.data, options.images, dataset)
        conditions = study.conditions_of(name, options.data, options.images, dataset, folder)
        found = study.results(conditions, folder, made, options.only, retry=options.retry)
        models.append(
            {
                "model": name,
                "small": RECIPE.input_size,
                "large": study.LARGE,
                "budget": options.images,
                "n_test": len(dataset.test),
                "results": [
                    {key: value for key, value in one.items() if key != "job"} for one in found
                ],  # paths of here
                "deployed": study.deployed(found, folder, dataset.test),
            }
        )
    document = {
        "made_on": f"Made by `python -m bench.peers` on {made_on()}. Data: {options.data}.",
        "models": models,
        "environments": {name: one.facts for name, one in made.items() if name != OURS},
    }
    options.page.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.page.with_suffix(".json"), json.dumps(document, indent=1) + "\n")
    write_text(options.page, table.page(document))
    print(f"written to {options.page}")


if __name__ == "__main__":
    main()
