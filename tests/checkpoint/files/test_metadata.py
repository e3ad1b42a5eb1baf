"""`.metadata` that somebody has made: whatever it names and does with it, nothing runs and nothing stays."""

import importlib
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import filesystem, metadata, planner

from illada_megatron.checkpoint.files import metadata as ours
from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.files.local_files import LocalFolder
from illada_megatron.checkpoint.files.metadata import Piece, TensorInfo, pickled_metadata, read_metadata

CLASSES = [
    (module.__name__, name)
    for module in (metadata, filesystem, planner)
    for name, value in vars(module).items()
    if isinstance(value, type) and ours._is_named(module.__name__, name)
]
NAMES = [name for name in sorted(ours._NAMES) if name[0] != "pathlib._local"] + CLASSES
INFO = TensorInfo((4, 3), torch.float32, [Piece((0, 0), (4, 3), "__0_0.distcp", 0, 1000)])


def _global(module: str, name: str) -> bytes:
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def _text(text: str) -> bytes:
    return b"X" + len(text.encode()).to_bytes(4, "little") + text.encode()


def _read(tmp_path: Path, content: bytes) -> dict[str, TensorInfo]:
    (tmp_path / ".metadata").write_bytes(content)
    return read_metadata(LocalFolder(tmp_path))


# state of BUILD: a dictionary, and (None, attributes), which pickle sets with setattr
STATES = {
    "dictionary": b"}" + _text("attacked") + b"I1\ns",
    "attributes": b"N}" + _text("attacked") + b"I1\ns\x86",
}
OBJECTS = {
    "itself": b"",
    "what it makes of nothing": b")R",
    "what it makes of a text": b"(" + _text("/nowhere") + b"tR",
    "a new one": b")\x81",
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("object_", OBJECTS)
@pytest.mark.parametrize("name", NAMES, ids=".".join)
def test_build_leaves_every_allowed_name_as_it_was(
    name: tuple[str, str], object_: str, state: str, tmp_path: Path
) -> None:
    """pickle's BUILD gives attributes to whatever lies on its stack: a class of this process would keep them."""
    real = getattr(importlib.import_module(name[0]), name[1])
    before = dict(getattr(real, "__dict__", {}))
    with pytest.raises(CheckpointError, match=r"\.metadata: .*damaged or not a checkpoint"):
        _read(tmp_path, b"\x80\x02" + _global(*name) + OBJECTS[object_] + STATES[state] + b"b.")
    assert not hasattr(real, "attacked")
    assert dict(getattr(real, "__dict__", {})) == before


def test_a_class_that_was_attacked_is_new_for_the_next_checkpoint(tmp_path: Path) -> None:
    """Stand-ins of one file are not those of another."""
    name = ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata")
    with pytest.raises(CheckpointError):
        _read(tmp_path, b"\x80\x02" + _global(*name) + STATES["attributes"] + b"b.")
    assert _read(tmp_path, pickled_metadata({"w": INFO})) == {"w": INFO}


def test_a_method_of_a_path_is_not_replaced(tmp_path: Path) -> None:
    """With the attack that once put a text of the attacker's into an export's modeling file."""
    attack = b"N}" + _text("read_bytes") + _global("torch", "Size") + b"s\x86b"
    with pytest.raises(CheckpointError):
        _read(tmp_path, b"\x80\x02" + _global("pathlib", "PosixPath") + attack + b".")
    (tmp_path / "file").write_bytes(b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04Nr\xff\xff\xff\x07.",  # LONG_BINPUT: memo[2^27 - 1]
        b"\x80\x04Np99999999\n.",  # PUT
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x0f",  # BINBYTES8 of 2^60 bytes
        b"\x80\x05\x96" + (1 << 31).to_bytes(8, "little"),  # BYTEARRAY8 of 2 GB
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x0fN.",  # a FRAME of as many
        b"\x80\x04" + b"(" * 10**6,
        b"\x80\x04" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".",
    ],
    ids=["memo", "memo in text", "bytes", "bytearray", "frame", "marks", "nested lists"],
)
def test_a_few_bytes_do_not_take_the_memory(content: bytes, tmp_path: Path) -> None:
    """In a process of its own, whose peak can be measured: pickle in C takes 2 GB for the first."""
    (tmp_path / ".metadata").write_bytes(content)
    code = """
import resource, sys
from pathlib import Path
from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.files.local_files import LocalFolder
from illada_megatron.checkpoint.files.metadata import read_metadata
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_metadata(LocalFolder(Path(sys.argv[1])))
except CheckpointError as error:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)
"""
    line = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    kilobytes, _, message = done.stdout.partition(" ")
    assert "damaged or not a checkpoint's" in message
    assert int(kilobytes) < 300_000


def _pickled(**changes: Any) -> bytes:
    """A good `.metadata` of one tensor, with fields of its piece and of its place in the file changed."""
    found = pickle.loads(pickled_metadata({"w": INFO}))
    (where,) = found.storage_data.values()
    (chunk,) = found.state_dict_metadata["w"].chunks
    for field, value in changes.items():
        target = where if hasattr(where, field) else chunk if hasattr(chunk, field) else found.state_dict_metadata["w"]
        object.__setattr__(target, field, value)
    return pickle.dumps(found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"relative_path": "../other/__0_0.distcp"}, "names the file ../other"),
        ({"relative_path": "/etc/passwd"}, "names the file /etc/passwd"),
        ({"relative_path": ".."}, r"names the file \.\."),
        ({"relative_path": ""}, "names the file "),
        ({"relative_path": "a\0b"}, "names the file a"),
        ({"relative_path": "a\x1b[2Jb"}, "names the file a"),
        ({"relative_path": Path("__0_0.distcp")}, "a file's name is of type PosixPath, expected str"),
        ({"offset": -1}, "numbers from 0 to 2"),
        ({"length": 2**63}, "numbers from 0 to 2"),
        ({"length": 1.0}, "numbers from 0 to 2"),
        ({"sizes": torch.Size((4, -3))}, "numbers from 0 to 2"),
        ({"size": (4, "3")}, "numbers from 0 to 2"),
    ],
)
def test_what_its_fields_cannot_be(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert _read(tmp_path, _pickled()) == {"w": INFO}
    with pytest.raises(CheckpointError, match=message):
        _read(tmp_path, _pickled(**changes))
