"""All files of a run as one zip, made while it is sent."""

from __future__ import annotations

import hashlib
import io
import subprocess
import zipfile
from pathlib import Path

from compress.report import bundle


def test_the_zip_holds_every_byte_and_the_hashes_verify(tmp_path: Path) -> None:
    contents = {
        "report.json": b"{}",
        "artifacts/deep/weights.bin": bytes(range(256)) * 9000,  # more than one piece
        "artifacts/<odd> & name.txt": b"",
    }
    for name, data in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    files = {name: tmp_path / name for name in contents}
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    pieces = list(bundle.stream(files, hashes, "espalier-0123"))
    assert len(pieces) > 3 and max(map(len, pieces)) < 2 * bundle.CHUNK, "it is sent in pieces"
    with zipfile.ZipFile(io.BytesIO(b"".join(pieces))) as archive:
        assert archive.testzip() is None
        assert set(archive.namelist()) == {f"espalier-0123/{name}" for name in (*contents, bundle.SUMS)}
        for name, data in contents.items():
            assert archive.read(f"espalier-0123/{name}") == data
        archive.extractall(tmp_path / "out")
    folder = tmp_path / "out" / "espalier-0123"
    checked = subprocess.run(["sha256sum", "-c", bundle.SUMS], cwd=folder, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout.count("OK") == 3
