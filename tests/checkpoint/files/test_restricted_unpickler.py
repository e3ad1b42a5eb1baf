"""Files of torch.save that somebody has made; what they name is in `megatron/test_legacy_files.py`."""

import io
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.files.restricted_unpickler import load_plain


def _packed(archive: bytes, compression: int) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(packed, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return packed.getvalue()


@pytest.mark.parametrize("as_content", [False, True])
def test_an_archive_that_is_compressed_is_refused(as_content: bool, tmp_path: Path) -> None:
    """torch reads it, and a megabyte of it can be gigabytes."""
    file, blob = tmp_path / "file.pt", io.BytesIO()
    torch.save({"text": "x" * 10_000_000}, blob)
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        content = _packed(blob.getvalue(), compression)
        file.write_bytes(content)
        assert torch.load(file, weights_only=True)["text"]
        if compression == zipfile.ZIP_STORED:
            assert load_plain(file, content if as_content else None)["text"]
            continue
        assert len(content) < 20_000
        with pytest.raises(CheckpointError, match=r"file\.pt: .*is compressed, which torch\.save never does"):
            load_plain(file, content if as_content else None)


@pytest.mark.parametrize("content", [b"", b"PK\x05\x06" + bytes(18), b"\x80\x02]q\x00.", b"x" * 1000])
def test_what_is_no_archive_of_torch(content: bytes, tmp_path: Path) -> None:
    """The formats of torch before 1.6 too: their tensors do not lie in one piece."""
    (tmp_path / "file.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"file\.pt: not a file of torch\.save that can be read safely: ."):
        load_plain(tmp_path / "file.pt")


def test_a_megabyte_stays_one(tmp_path: Path) -> None:
    """In a process of its own, whose peak can be measured."""
    blob = io.BytesIO()
    with zipfile.ZipFile(blob, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("archive/data.pkl", "w") as entry:
            entry.write(b"\x80\x02X" + (1 << 30).to_bytes(4, "little"))
            for _ in range(1 << 10):
                entry.write(b"x" * (1 << 20))
            entry.write(b".")
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/byteorder", b"little")
    file = tmp_path / "file.pt"
    file.write_bytes(blob.getvalue())
    code = """
import resource, sys
from pathlib import Path
from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.files.restricted_unpickler import load_plain
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    load_plain(Path(sys.argv[1]))
except CheckpointError as error:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)
"""
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True)
    kilobytes, _, message = done.stdout.partition(" ")
    assert "is compressed" in message
    assert int(kilobytes) < 100_000
