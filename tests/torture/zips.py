"""Zips of images with something unusual in them, each with its stated verdict; `docs/uploads.md` lists them."""

from __future__ import annotations

import stat
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from image_files import encoded, open_at, photo, zipped
from PIL import Image

from compress.errors import DataError
from torture.rows import Outcome, Row

PER_CLASS = 24
REFUSED, USED, SKIPPED, LEFT_OUT = "refused", "used", "the image is skipped and listed", "left out"

Entries = dict[str, bytes]


@dataclass(frozen=True)
class Case:
    write: Callable[[Path], object]
    verdict: str
    words: str = ""
    """Part of the refusal or of the note."""
    images: int | None = None
    """How many are used, in both parts together; None for a refusal."""


# ---- writers ------------------------------------------------------------------------------------------------------


def pets(root: str = "", names: tuple[str, ...] = ("cat", "dog"), first: int = 0) -> Entries:
    return {
        f"{root}{name}/{number}.png": encoded(photo(first + 100 * index + number, (10, 8)))
        for index, name in enumerate(names)
        for number in range(PER_CLASS)
    }


def _plain(entries: Entries) -> Callable[[Path], object]:
    return lambda path: zipped(path, entries)


def _with(**files: bytes | Callable[[], bytes]) -> Callable[[Path], object]:
    """Two honest classes and these entries; `__` in a name stands for a slash, `_dot_` for a dot."""
    named = {name.replace("__", "/").replace("_dot_", "."): made for name, made in files.items()}
    return lambda path: zipped(
        path, pets() | {name: made() if callable(made) else made for name, made in named.items()}
    )


def _entry(name: str, content: bytes = b"x") -> Callable[[Path], object]:
    return lambda path: zipped(path, pets() | {name: content})


def _patched(patch: Callable[[bytearray], None]) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        zipped(path, pets())
        data = bytearray(path.read_bytes())
        patch(data)
        path.write_bytes(bytes(data))

    return write


def _overlap(data: bytearray) -> None:
    first = data.index(b"PK\x01\x02")
    second = data.index(b"PK\x01\x02", first + 4)
    data[second + 42 : second + 46] = data[first + 42 : first + 46]


def _encrypt(data: bytearray) -> None:
    data[data.index(b"PK\x01\x02") + 8] |= 1


def _claim_many(data: bytearray) -> None:
    at = data.rindex(b"PK\x05\x06")
    data[at + 8 : at + 12] = struct.pack("<HH", 20_001, 20_001)


def _cut_short(data: bytearray) -> None:
    del data[-30:]


def _lie_about_a_size(data: bytearray) -> None:
    at = data.index(b"PK\x01\x02")
    data[at + 24 : at + 28] = struct.pack("<I", 50)


def _with_link(path: Path) -> None:
    zipped(path, pets())
    with zipfile.ZipFile(path, "a") as file:
        link = zipfile.ZipInfo("cat/link.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        file.writestr(link, "/etc/passwd")


def _huge_header() -> bytes:
    """6000 x 6000 pixels in a hundred bytes."""
    data = bytearray(encoded(Image.new("1", (8, 8))))
    data[16:24] = struct.pack(">II", 6000, 6000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def _strip() -> bytes:
    """14 x 990,000 pixels, fewer than 25 million: by its shorter side it would grow to 11 GB."""
    return encoded(Image.new("1", (14, 990_000)))


def _many_scans() -> bytes:
    data = encoded(photo(903, (16, 16)), "JPEG", progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * 100 + data[-2:]


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(photo(900, (12, 8)), "JPEG", exif=exif)


def _sixteen_bit() -> bytes:
    return encoded(Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16)))


def _several(kind: str) -> bytes:
    return encoded(photo(901, (8, 8)), kind, save_all=True, append_images=[photo(902, (8, 8))])


def _twice(part: str) -> Entries:
    """The first cat of the other part once more."""
    return {f"{part}/cat/again.png": encoded(photo(0, (10, 8)))}


# ---- the list -----------------------------------------------------------------------------------------------------

ALL = 2 * PER_CLASS
CASES: dict[str, Case] = {
    "class folders": Case(_plain(pets()), USED, images=ALL),
    "one folder around the class folders": Case(_plain(pets("pets/")), USED, images=ALL),
    "two folders around the class folders": Case(_plain(pets("upload/pets/")), USED, images=ALL),
    "`__MACOSX`, `.DS_Store`, `Thumbs.db`": Case(
        _plain(pets("a/") | {"__MACOSX/a/cat/._0.png": b"x", "a/cat/.DS_Store": b"x", "a/Thumbs.db": b"x"}),
        USED,
        images=ALL,
    ),
    "train/ and test/": Case(_plain(pets("train/") | pets("test/", first=400)), USED, images=2 * ALL),
    "images without class folders": Case(
        _plain({f"photos/{number}.png": encoded(photo(number)) for number in range(12)}),
        "used without labels",
        "no class folders",
        images=12,
    ),
    "files that are no images": Case(_with(cat__notes_dot_txt=b"x"), LEFT_OUT, "1 files that are not images", ALL),
    "a training image that is also a test image": Case(
        _plain(pets("train/") | pets("test/", first=400) | _twice("test")),
        "left out of training",
        "1 training images that are also test images",
        2 * ALL,
    ),
    "one folder, which may be a class or just a folder": Case(
        _plain(pets(names=("cat",))), "used without labels", "no class folders", PER_CLASS
    ),
    "train/ and test/ with one class": Case(
        _plain(pets("train/", ("cat",)) | pets("test/", ("cat",), 400)), REFUSED, "needs at least 2"
    ),
    "more classes than the model has": Case(_plain(pets(names=("a", "b", "c"))), REFUSED, "has 3 class folders"),
    "other classes in test/ than in train/": Case(
        _plain(pets("train/") | pets("test/", ("cat", "cow"))), REFUSED, "differ (test/cow)"
    ),
    "images beside class folders": Case(
        _with(loose_dot_png=lambda: encoded(photo(9))), REFUSED, "beside class folders"
    ),
    "a class of 9 images": Case(
        _plain(pets() | {f"cow/{n}.png": b"x" for n in range(9)}), REFUSED, "has 3 class folders"
    ),
    "no image at all": Case(_plain({"a/notes.txt": b"x"}), REFUSED, "There are no images"),
    "a name that leads out (`../`)": Case(_entry("../evil.png"), REFUSED, "leads out of the folder"),
    "a name that leads out further in": Case(_entry("cat/../../evil.png"), REFUSED, "leads out of the folder"),
    "an absolute name": Case(_entry("/etc/evil.png"), REFUSED, "leads out of the folder"),
    "a drive letter": Case(_entry("C:evil.png"), REFUSED, "leads out of the folder"),
    "backslashes": Case(_entry("cat\\..\\evil.png"), REFUSED, "leads out of the folder"),
    "a control character in a name": Case(_entry("cat/a\nb.png"), REFUSED, "a control character (U+000A)"),
    "a control character of Latin-1 in a name": Case(_entry("cat/a\x9bb.png"), REFUSED, "a control character (U+009B)"),
    "a name that is read from right to left": Case(
        _entry("cat/a\u202egpj.png"), REFUSED, "turns the direction of text"
    ),
    "a symbolic link": Case(_with_link, REFUSED, "symbolic link"),
    "entries that overlap": Case(_patched(_overlap), REFUSED, "entries overlap"),
    "two names that differ in case only": Case(_entry("CAT/0.PNG"), REFUSED, "the same name"),
    "an archive inside": Case(_entry("cat/more.tar.gz"), REFUSED, "another archive"),
    "more than 6 folders deep": Case(_entry("a/b/c/d/e/f/g/h.png"), REFUSED, "deeper than 6"),
    "a name of 260 bytes": Case(_entry(f"cat/{'x' * 260}.png"), REFUSED, "longer than 255"),
    "an entry that unpacks to over 200 times its size": Case(
        _entry("cat/bomb.bmp", bytes(3_000_000)), REFUSED, "more than 200 times"
    ),
    "a directory of over 20,000 entries": Case(_patched(_claim_many), REFUSED, "more than 20000 entries"),
    "encryption": Case(_patched(_encrypt), REFUSED, "encrypted"),
    "an upload that was cut off": Case(_patched(_cut_short), REFUSED, "directory is missing"),
    "not a zip": Case(lambda path: path.write_bytes(b"Rar!"), REFUSED, "it is a RAR archive, not a zip"),
    "an empty file": Case(lambda path: path.write_bytes(b""), REFUSED, "it is empty"),
    "a zip without files": Case(_plain({}), REFUSED, "There are no images"),
    "a size that is not the entry's": Case(_patched(_lie_about_a_size), SKIPPED, "damaged inside the zip", ALL - 1),
    "JPEG turned by EXIF": Case(_with(cat__turned_dot_jpg=_turned), "used, upright", images=ALL + 1),
    "CMYK": Case(_with(cat__c_dot_jpg=lambda: encoded(photo(8, mode="CMYK"), "JPEG")), "used, as RGB", images=ALL + 1),
    "a palette": Case(_with(cat__p_dot_png=lambda: encoded(photo(8, mode="P"))), "used, as RGB", images=ALL + 1),
    "grey": Case(_with(cat__g_dot_png=lambda: encoded(photo(8, mode="L"))), "used, as RGB", images=ALL + 1),
    "transparency": Case(
        _with(cat__t_dot_png=lambda: encoded(photo(8, mode="RGBA"))), "used, on white", images=ALL + 1
    ),
    "JPEG with a preview image (MPO)": Case(
        _with(cat__m_dot_jpg=lambda: _several("MPO")), "used, its first image", images=ALL + 1
    ),
    "16 bits per channel": Case(_with(cat__s_dot_png=_sixteen_bit), SKIPPED, "more than 8 bits per channel", ALL),
    "animated PNG": Case(_with(cat__a_dot_png=lambda: _several("PNG")), SKIPPED, "animated", ALL),
    "animated WebP": Case(_with(cat__a_dot_webp=lambda: _several("WEBP")), SKIPPED, "animated", ALL),
    "GIF named .png": Case(_with(cat__g_dot_png=lambda: encoded(photo(8), "GIF")), SKIPPED, "not a JPEG", ALL),
    "TIFF": Case(_with(cat__t_dot_tif=lambda: encoded(photo(8), "TIFF")), SKIPPED, "not a JPEG", ALL),
    "EPS named .jpg": Case(_with(cat__e_dot_jpg=b"%!PS-Adobe-3.0 EPSF-3.0\n"), SKIPPED, "not a JPEG", ALL),
    "an empty image": Case(_with(cat__e_dot_png=b""), SKIPPED, "not a JPEG", ALL),
    "a JPEG that is cut off": Case(
        _with(cat__c_dot_jpg=lambda: encoded(photo(8), "JPEG")[:-300]), SKIPPED, "damaged or cut off", ALL
    ),
    "over 25 million pixels": Case(_with(cat__h_dot_png=_huge_header), SKIPPED, "more than 25 million", ALL),
    "one side over 100 times the other": Case(_with(cat__s_dot_png=_strip), SKIPPED, "over 100 times the other", ALL),
    "a JPEG of over 100 scans": Case(_with(cat__s_dot_jpg=_many_scans), SKIPPED, "more than 100 scans", ALL),
    "over 5 % of unusable images": Case(
        _plain(pets() | {f"cat/bad{n}.png": b"x" for n in range(4)}), REFUSED, "4 of 52 images"
    ),
}


def wrong(name: str, folder: Path) -> str | None:
    """What differs from the stated verdict; None when nothing does."""
    case, path = CASES[name], folder / "upload.zip"
    case.write(path)
    try:
        dataset = open_at(path)
    except DataError as error:
        if case.verdict != REFUSED:
            return f"refused: {error}"
        return None if case.words in str(error) else f"refused for another reason: {error}"
    if case.verdict == REFUSED:
        return "not refused"
    if len(dataset.train) + len(dataset.test) != case.images:
        return f"{len(dataset.train) + len(dataset.test)} images were used, not {case.images}"
    if case.words not in " ".join(dataset.notes):
        return f"the notes do not tell {case.words!r}: {dataset.notes}"
    strangers = [entry.name for entry in folder.iterdir() if entry.name != path.name]
    return f"files were left: {strangers}" if strangers else None


def verdict_table() -> str:
    rows = "".join(f"| {name} | {case.verdict} |\n" for name, case in CASES.items())
    return f"| in the zip | verdict |\n|---|---|\n{rows}"


def run(folder: Path, full: bool) -> Outcome:
    del full  # all of it is quick
    failures = tuple(f"{name}: {found}" for name in CASES if (found := wrong(name, folder)))
    return Outcome(f"{len(CASES) - len(failures)} of {len(CASES)} as stated", failures)


ZIPS = Row("zips", "image zips and what is in them", "each its stated verdict, nothing written", run)
