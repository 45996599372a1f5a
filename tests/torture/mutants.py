"""Honest files with something changed at random: read, or refused by our own error; nothing else may happen.

`make fuzz` tries a million. A mutant is made from a seed and its number alone, so each can be made again:
`python -m torture.mutants --seed 7 --first 12345 --count 1`.
"""

from __future__ import annotations

import argparse
import io
import random
import struct
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from checkpoint_files import small_state
from image_files import encoded, open_at, photo, zipped
from safetensors.torch import save_file

from compress.checkpoints import reader
from compress.checkpoints.loader import Loader, LoaderFailed
from compress.errors import CheckpointError, DataError
from torture.rows import Outcome, Row

COUNT = 10_000
SLOW_S = 5.0
INTERESTING = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
WORDS = (b"-1", b"0", b"1e9", b"null", b"[]", b"{}", b'"F32"', b'"C64"', b"9999999999", b"../", b"\x00", b"\xff\xfe")

Change = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True)
class Seed:
    suffix: str
    data: bytes
    opens: Callable[[Path, Loader], None]


# ---- what is changed ----------------------------------------------------------------------------------------------


def _set_bytes(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def _flip_bit(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def _set_number(data: bytes, rng: random.Random) -> bytes:
    size, value = rng.choice((1, 2, 4, 8)), rng.choice(INTERESTING)
    at = rng.randrange(max(1, len(data) - size))
    return data[:at] + (value % 256**size).to_bytes(size, rng.choice(("little", "big"))) + data[at + size :]


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def _drop(data: bytes, rng: random.Random) -> bytes:
    start, stop = _slice(data, rng)
    return data[:start] + data[stop:]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    start, stop = _slice(data, rng)
    return data[:stop] + data[start:stop] * rng.choice((1, 2, 50)) + data[stop:]


def _move(data: bytes, rng: random.Random) -> bytes:
    start, stop = _slice(data, rng)
    rest = data[:start] + data[stop:]
    at = rng.randrange(len(rest) + 1)
    return rest[:at] + data[start:stop] + rest[at:]


def _insert(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice((rng.choice(WORDS), rng.randbytes(rng.randrange(1, 9)))) + data[at:]


def _slice(data: bytes, rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(len(data))
    return start, min(len(data), start + rng.choice((1, 4, 30, 100, 1000)))


CHANGES: tuple[Change, ...] = (_set_bytes, _flip_bit, _set_number, _cut, _drop, _repeat, _move, _insert)


def _inside_zip(data: bytes, rng: random.Random) -> bytes:
    """One entry or one name changed, and the archive written again: sizes and checksums are right."""
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        entries = [(entry.filename, old.read(entry), entry.compress_type) for entry in old.infolist()]
    chosen = rng.choice((rng.randrange(len(entries)), 0))  # the index of tensors comes first
    name, content, kind = entries[chosen]
    if rng.random() < 0.1:
        name = _any_change(name.encode(), rng).decode("latin1") or "x"
    elif content:
        content = _any_change(content, rng)
    entries[chosen] = (name, content, kind)
    if rng.random() < 0.05:
        rng.shuffle(entries)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as new:
        for name, content, kind in entries:
            entry = zipfile.ZipInfo(name)
            entry.compress_type = kind
            new.writestr(entry, content)
    return out.getvalue()


def _inside_header(data: bytes, rng: random.Random) -> bytes:
    """The JSON of a safetensors file changed, and its length put right."""
    (length,) = struct.unpack_from("<Q", data)
    header = _any_change(data[8 : 8 + length], rng)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def _any_change(data: bytes, rng: random.Random) -> bytes:
    return rng.choice(CHANGES)(data, rng)


def mutant(seed: Seed, rng: random.Random) -> bytes:
    """One change in three is to the file as a whole; the others keep its outside right, so that they get further in."""
    data = seed.data
    for _ in range(rng.choice((1, 1, 2))):
        if not data:
            break
        inside = _inside_header if seed.suffix == ".safetensors" else _inside_zip
        try:
            data = inside(data, rng) if rng.random() < 2 / 3 else _any_change(data, rng)
        except Exception:  # noqa: BLE001 - an earlier change has broken its outside
            data = _any_change(data, rng)
    return data


# ---- what is tried ------------------------------------------------------------------------------------------------


def _read_checkpoint(path: Path, loader: Loader) -> None:
    tensors = reader.read(path, loader=loader)
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values() if tensor.is_floating_point())


def _open_images(path: Path, _: Loader) -> None:
    dataset = open_at(path)
    assert len(dataset.train) and len(dataset.test)


def seeds(folder: Path) -> list[Seed]:
    state = small_state()
    optimizer = torch.optim.SGD([torch.nn.Parameter(tensor) for tensor in (state["0.weight"],)], lr=0.1, momentum=0.9)
    written = []
    for made in (
        state,
        {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}},
        {"model": state, "optimizer": optimizer.state_dict(), "classes": ["a", "b"]},
    ):
        torch.save(made, folder / "seed")
        written.append((".pth", _without_padding((folder / "seed").read_bytes())))
    facts = {"class_names": '["a", "b"]', "preprocessing": '{"input_size": 8, "mean": [0, 0, 0], "std": [1, 1, 1]}'}
    for metadata in (None, facts):
        save_file(state, folder / "seed", metadata=metadata)
        written.append((".safetensors", (folder / "seed").read_bytes()))
    checkpoint_seeds = [Seed(suffix, data, _read_checkpoint) for suffix, data in written]
    image_seeds = [Seed(".zip", _images(folder, kinds), _open_images) for kinds in (("PNG",), ("JPEG", "WEBP", "BMP"))]
    return checkpoint_seeds + image_seeds


def _without_padding(data: bytes) -> bytes:
    """The same archive in a tenth of the bytes, so that a change hits something."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    return out.getvalue()


def _images(folder: Path, kinds: tuple[str, ...]) -> bytes:
    """Two classes of ten images of 6 x 5 pixels."""
    entries = {
        f"pets/{name}/{number}.{kinds[number % len(kinds)].lower()}": encoded(
            photo(50 * index + number, (6, 5)), kinds[number % len(kinds)]
        )
        for index, name in enumerate(("cat", "dog"))
        for number in range(11)
    }
    return zipped(folder / "seed", entries).read_bytes()


@dataclass(frozen=True)
class Tried:
    number: int
    verdict: str
    """read, refused, or what should not happen."""
    wrong: bool
    seconds: float


def trials(folder: Path, *, seed: int, first: int, count: int) -> Iterator[Tried]:
    sources = seeds(folder)
    with Loader() as loader:
        for number in range(first, first + count):
            rng = random.Random(f"{seed}:{number}")
            source = rng.choice(sources)
            path = folder / f"mutant{source.suffix}"
            path.write_bytes(mutant(source, rng))
            started = time.perf_counter()
            verdict, wrong = _verdict(source, path, loader)
            yield Tried(number, verdict, wrong, time.perf_counter() - started)


def _verdict(source: Seed, path: Path, loader: Loader) -> tuple[str, bool]:
    try:
        source.opens(path, loader)
    except (CheckpointError, DataError) as error:
        status = error.__cause__.status if isinstance(error.__cause__, LoaderFailed) else 0
        if status < 0:
            return f"the loader ended by signal {-status}", True
        return ("refused by the loader", False) if status else ("refused", False)
    except Exception as error:  # noqa: BLE001 - any other type is what is looked for
        return f"an unexpected {type(error).__name__}: {error}", True
    return "read", False


def try_mutants(folder: Path, *, seed: int, first: int, count: int, timed: bool) -> Outcome:
    verdicts: Counter[str] = Counter()
    failures, slowest = [], 0.0
    for tried in trials(folder, seed=seed, first=first, count=count):
        slowest = max(slowest, tried.seconds)
        verdicts[tried.verdict if not tried.wrong else "wrong"] += 1
        if tried.wrong:
            failures.append(f"--seed {seed} --first {tried.number}: {tried.verdict}")
        elif timed and tried.seconds > SLOW_S:
            failures.append(f"--seed {seed} --first {tried.number}: {tried.seconds:.1f} s")
    counted = ", ".join(f"{number:,} {verdict}" for verdict, number in verdicts.most_common())
    return Outcome(f"{count:,} mutants: {counted}; slowest {1000 * slowest:.0f} ms", tuple(failures))


MUTANTS = Row(
    "mutants",
    "random mutants of checkpoints and zips, 10,000 (`make fuzz`: 1,000,000)",
    "0 crashes, 0 unexpected exception types",
    lambda folder, full: try_mutants(folder, seed=0, first=0, count=COUNT, timed=full),
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="torture.mutants")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--folder", type=Path, required=True, help="an empty folder; the last mutant stays there")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    outcome = try_mutants(
        arguments.folder, seed=arguments.seed, first=arguments.first, count=arguments.count, timed=True
    )
    print(outcome.figure)
    for line in outcome.failures:
        print(line)
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    sys.exit(main())
