"""Tensors in torch's checkpoint files: what is written is read, by us, by torch and by megatron-core, box by box."""

import itertools
import os
import pickle
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.files.storage import folder
from illada_megatron.checkpoint.files.tensors import TensorReader, TensorWriter, write_metadata


def _some(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.arange(1, 1 + int(torch.Size(shape).numel())).view(shape).to(dtype)


def _write(path: Path, tensors: dict[str, Tensor], piece_bytes: int = 1 << 20) -> None:
    place = folder(path)
    place.make()
    writer = TensorWriter(place, piece_bytes=piece_bytes)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    write_metadata(place, [writer.close()])


TENSORS = {
    "matrix": _some(37, 11),
    "half": _some(20, 3, dtype=torch.bfloat16),
    "vector": _some(100),
    "cube": _some(5, 7, 3),
    "scalar": torch.tensor(3.5),
    "count": torch.tensor([7], dtype=torch.int64),
}


@pytest.mark.parametrize("piece_bytes", [1, 100, 1 << 20])
def test_what_was_written_is_read(piece_bytes: int, tmp_path: Path) -> None:
    _write(tmp_path, TENSORS, piece_bytes)
    reader = TensorReader(tmp_path)
    assert set(reader.tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        info = reader.tensors[name]
        assert (info.shape, info.dtype, info.nbytes) == (tuple(tensor.shape), tensor.dtype, tensor.nbytes)
        assert torch.equal(reader.read(name), tensor)


def test_every_box(tmp_path: Path) -> None:
    """From pieces that it begins and ends in the middle of; into another dtype too."""
    _write(tmp_path, TENSORS, piece_bytes=4 * 11 * 5)
    reader, chance = TensorReader(tmp_path), random.Random(1)
    for name, tensor in TENSORS.items():
        for _ in range(40):
            offset = [chance.randrange(length) for length in tensor.shape]
            shape = [chance.randint(1, length - first) for first, length in zip(offset, tensor.shape, strict=True)]
            box = tensor[tuple(slice(a, a + n) for a, n in zip(offset, shape, strict=True))]
            assert torch.equal(reader.read(name, offset, shape), box), (name, offset, shape)
            flat = torch.zeros(box.numel(), dtype=torch.float64)
            reader.read(name, offset, shape, out=flat)
            assert torch.equal(flat, box.double().reshape(-1)), (name, offset, shape)


def test_boxes_of_several_writers(tmp_path: Path) -> None:
    """A flat range of a row-major tensor: the end of a row, whole rows, the beginning of one."""
    whole, place = _some(6, 10), folder(tmp_path)
    first, second = TensorWriter(place, 0), TensorWriter(place, 1)
    first.write("w", whole[:2], (0, 0), (6, 10))
    first.write("w", whole[2:3, :4], (2, 0), (6, 10))
    second.write("w", whole[2:3, 4:], (2, 4), (6, 10))
    second.write("w", whole[3:], (3, 0), (6, 10))
    files = write_metadata(place, [first.close(), second.close()])
    assert list(files) == [".metadata", "__0_0.distcp", "__1_0.distcp", "common.pt", "metadata.json"]
    reader = TensorReader(tmp_path)
    assert torch.equal(reader.read("w"), whole)
    assert torch.equal(reader.read("w", (1, 2), (3, 5)), whole[1:4, 2:7])


def test_missing_part_is_not_written_and_not_read(tmp_path: Path) -> None:
    place = folder(tmp_path)
    writer = TensorWriter(place)
    writer.write("w", _some(2, 10), (0, 0), (6, 10))
    with pytest.raises(CheckpointError, match="20 of its 60 elements are there"):
        write_metadata(place, [writer.close()])
    _write(tmp_path, {"w": _some(2, 10)})
    with pytest.raises(CheckpointError, match=r"w has shape \(2, 10\), asked for were \(2, 10\) at \(1, 0\)"):
        TensorReader(tmp_path).read("w", (1, 0), (2, 10))
    with pytest.raises(CheckpointError, match="holds no tensor v"):
        TensorReader(tmp_path).read("v")


def test_torch_reads_it(tmp_path: Path) -> None:
    _write(tmp_path, TENSORS, piece_bytes=100)
    found = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    dcp.load(found, checkpoint_id=tmp_path, no_dist=True)
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name], tensor), name


def test_torch_writes_it(tmp_path: Path) -> None:
    """Pieces that torch wrote, and such that another version would have written with another envelope."""
    dcp.save(dict(TENSORS), checkpoint_id=tmp_path, no_dist=True)
    reader = TensorReader(tmp_path)
    for name, tensor in TENSORS.items():
        assert torch.equal(reader.read(name), tensor), name


def test_archives_that_are_none(tmp_path: Path) -> None:
    """Where no tensor of the right size lies, nothing is read, whatever lies there."""
    _write(tmp_path, TENSORS)
    file = tmp_path / "__0_0.distcp"
    whole = file.read_bytes()
    for old, new in ((b"PK\x03\x04", b"PK\x03\x05"), (b"/data/0", b"/data/1"), (b"PK", b"\0\0")):
        file.write_bytes(whole.replace(old, new))
        with pytest.raises(CheckpointError, match=r"__0_0\.distcp: damaged: at byte 0 lies no tensor"):
            TensorReader(tmp_path).read("matrix")
    file.write_bytes(whole)
    reader = TensorReader(tmp_path)
    info = reader.tensors["matrix"]
    reader.tensors["matrix"] = replace(info, shape=(37, 99), pieces=[replace(info.pieces[0], shape=(37, 99))])
    with pytest.raises(CheckpointError, match="14652 bytes lie in 3177 from 0 on of __0_0"):
        reader.read("matrix")


def test_megatron_core_reads_it(two_steps: Path) -> None:
    code = (
        "import os, sys, torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "from illada_megatron.runtime import cpu_adaptor; cpu_adaptor.install()\n"
        "from megatron.core.dist_checkpointing import load_plain_tensors\n"
        "from illada_megatron.checkpoint.files.tensors import TensorReader\n"
        "found, reader = load_plain_tensors(sys.argv[1]), TensorReader(sys.argv[1])\n"
        "assert set(found) == set(reader.tensors)\n"
        "assert all(torch.equal(found[name], reader.read(name)) for name in found), 'different'\n"
        "print(len(found))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    checkpoint = two_steps / "step_00000002"
    done = subprocess.run(
        [sys.executable, "-c", code, checkpoint], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 3 * (2 + 6 * 2)  # embedding, final norm, two layers of six; with two moments each


def test_a_file_cut_short_is_an_error(tmp_path: Path) -> None:
    _write(tmp_path, TENSORS)
    reader = TensorReader(tmp_path)
    reader.read("matrix")
    os.truncate(tmp_path / "__0_0.distcp", 1000)
    with pytest.raises(OSError, match=r"__0_0\.distcp: ends at byte 1000"):
        reader.read("matrix")
    with pytest.raises(CheckpointError, match=r"1628 bytes lie in 3177 from 0 on of __0_0\.distcp, which has 1000"):
        TensorReader(tmp_path).read("matrix")


def test_metadata_of_other_things_is_refused(tmp_path: Path) -> None:
    folder(tmp_path).replace(".metadata", pickle.dumps({"state_dict_metadata": {}}))
    with pytest.raises(CheckpointError, match="not a checkpoint's"):
        TensorReader(tmp_path)


@pytest.mark.parametrize("place", ["disk", "s3"])
def test_storage(place: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A disk and a bucket behave alike."""
    top = folder(tmp_path / "run" if place == "disk" else f"{request.getfixturevalue('s3')}/storage")
    assert not top.exists()
    assert top.folders() == top.files() == []
    inner = top / "step_1"
    inner.make()
    sink = inner.create("data")
    for part in (b"12345", memoryview(b"678"), b""):
        sink.write(part)
    sink.close()
    top.replace("latest", b"one")
    top.replace("latest", b"two")
    assert (top.exists(), top.folders(), top.files(), inner.files()) == (True, ["step_1"], ["latest"], ["data"])
    assert (top.read("latest"), inner.read("data"), inner.size("data"), inner.size("none")) == (
        *(b"two", b"12345678"),
        *(8, None),
    )
    out = memoryview(bytearray(3))
    inner.read_into("data", 4, out)
    assert bytes(out) == b"567"
    with pytest.raises(OSError, match=r"step_1/data: ends at byte 8|step_1/data: object storage failed"):
        inner.read_into("data", 7, out)
    with pytest.raises(FileNotFoundError):
        inner.read("none")
    inner.remove("none")
    assert (inner.name, str(inner.parent), str(inner)) == ("step_1", str(top), f"{top}/step_1")
    inner.clear()
    inner.clear()
    assert (top.folders(), top.files()) == ([], ["latest"])
    top.clear()
    assert not top.exists()


def test_large_objects_come_back(s3: str) -> None:
    """Larger than the parts of an upload, written in several pieces."""
    place, tensor = folder(f"{s3}/large"), _some(3000, 3001)
    writer = TensorWriter(place, piece_bytes=5 << 20)
    writer.write("w", tensor)
    write_metadata(place, [writer.close()])
    reader = TensorReader(place)
    assert torch.equal(reader.read("w"), tensor)
    assert torch.equal(reader.read("w", (1700, 2990), (900, 11)), tensor[1700:2600, 2990:])


def _slice(whole: Tensor, split: str | None, rank: int, size: int) -> Tensor:
    """Tensor-parallel rank `rank` of `size`'s part, as megatron-core's layers hold it."""
    if split is None:
        return whole
    if split == "gated rows":
        return torch.cat([half.chunk(size, 0)[rank] for half in whole.chunk(2, 0)])
    return whole.chunk(size, 1 if split == "columns" else 0)[rank]


def test_boxes_cover_a_rank_once() -> None:
    """Any flat range of any rank's tensor, for every way to divide one, lands where megatron-core's slices say."""
    from illada_megatron.checkpoint.state import boxes
    from illada_megatron.config.parameters import Parameter

    chance = random.Random(2)
    for split, size in itertools.product(("rows", "columns", "gated rows", None), (1, 2, 4)):
        for shape in ((8, 12), (16,)) if split in (None, "rows") else ((8, 12),):
            whole = torch.arange(torch.Size(shape).numel()).view(shape)
            found = torch.zeros_like(whole)
            for rank in range(size):
                own = _slice(whole, split, rank, size).reshape(-1)
                cuts = sorted({0, own.numel(), *(chance.randrange(own.numel()) for _ in range(3))})
                for start, stop in itertools.pairwise(cuts):
                    parts = list(boxes(Parameter("w", shape, split), rank, size, start, stop))  # type: ignore[arg-type]
                    assert len(parts) <= 6
                    assert [parts[0].start, parts[-1].stop] == [start, stop]
                    for box in parts:
                        at = tuple(slice(a, a + n) for a, n in zip(box.offset, box.shape, strict=True))
                        assert torch.equal(whole[at].reshape(-1), own[box.start : box.stop]), (split, size, rank, box)
                        found[at] += 1
            expected = size if split is None else 1
            assert torch.equal(found, torch.full_like(found, expected)), (split, size)


def test_a_piece_is_whole_or_an_error(tmp_path: Path) -> None:
    """Elements that are missing, or too many, would move everything behind them."""
    writer = TensorWriter(folder(tmp_path))
    writer.begin("a", torch.float32, (2, 3), (0, 0), (2, 3))
    writer.append(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="12 bytes of the last piece are missing"):
        writer.close()
    with pytest.raises(ValueError, match="12 bytes of the last piece are missing"):
        writer.begin("b", torch.float32, (1,), (0,), (1,))
    with pytest.raises(ValueError, match="12 bytes more than the piece has"):
        writer.append(torch.zeros(2, 3))
    writer.abandon()
