"""Pieces that do not make up their tensor: what is counted twice would leave another part as it was in memory."""

import itertools
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.files.metadata import Piece, TensorInfo, pickled_metadata
from illada_megatron.checkpoint.files.pieces import defect_of
from illada_megatron.checkpoint.files.storage import folder
from illada_megatron.checkpoint.files.tensors import TensorReader, TensorWriter, write_metadata


def _box(offset: tuple[int, ...], shape: tuple[int, ...]) -> Piece:
    return Piece(offset, shape, "__0_0.distcp", 0, 10**6)


def _info(shape: tuple[int, ...], *boxes: tuple[tuple[int, ...], tuple[int, ...]]) -> TensorInfo:
    return TensorInfo(shape, torch.float32, [_box(*box) for box in boxes])


@pytest.mark.parametrize(
    ("info", "defect"),
    [
        (_info((8, 2), ((0, 0), (4, 2)), ((0, 0), (4, 2))), "overlap"),
        (_info((8, 2), ((0, 0), (5, 2)), ((4, 0), (4, 2))), "overlap"),
        (_info((8, 2), ((0, 0), (8, 1)), ((0, 0), (8, 1))), "overlap"),
        (_info((4, 4), ((0, 0), (2, 2)), ((1, 1), (2, 2)), ((2, 2), (2, 4))), "does not lie in it"),
        (_info((4, 4), ((0, 0), (3, 3)), ((2, 2), (2, 2)), ((0, 3), (1, 1)), ((3, 0), (1, 2))), "overlap"),
        (_info((8,), ((0,), (4,))), "4 of its 8 elements are there"),
        (_info((8,), ((4,), (8,))), "does not lie in it"),
        (_info((8, 2), ((0,), (16,))), "does not lie in it"),
        (_info((), ((), ()), ((), ())), "overlap"),
        (_info((), ((0,), (1,))), "does not lie in it"),
        (_info((1 << 40, 1 << 40)), "more elements than any file holds"),
        (_info((8,), ((0,), (8,))), None),
        (_info((), ((), ())), None),
        (_info((0, 4)), None),
        (_info((0, 4), ((0, 0), (0, 4))), None),
    ],
)
def test_what_makes_up_a_tensor(info: TensorInfo, defect: str | None) -> None:
    found = defect_of(info)
    assert found is None if defect is None else found is not None and defect in found


def test_many_pieces_are_not_compared_each_with_each() -> None:
    """Of columns, all begin in the first row: 100,000 are 5 * 10^9 pairs."""
    columns = [((0, column), (16, 1)) for column in range(100_000)]
    assert defect_of(_info((16, 100_000), *columns)) is None
    moved = [*columns[:-1], ((0, 99_998), (16, 1))]
    assert "overlap" in str(defect_of(_info((16, 100_000), *moved)))
    assert "overlap" in str(defect_of(_info((16, 100_000), *columns, ((0, 0), (16, 1)))))


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_any_division_is_taken_and_any_change_of_it_is_not(dimensions: int) -> None:
    """Boxes cut again and again; then one is moved, or takes the place of another. The truth is a count."""
    chance = random.Random(dimensions)
    for _ in range(200):
        shape = tuple(chance.randint(1, 6) for _ in range(dimensions))
        boxes = [((0,) * dimensions, shape)]
        for _ in range(chance.randint(0, 8)):
            offset, size = boxes.pop(chance.randrange(len(boxes)))
            axis = chance.randrange(dimensions)
            cut = chance.randint(0, size[axis])
            low = tuple(cut if one == axis else length for one, length in enumerate(size))
            high = tuple(length - cut if one == axis else length for one, length in enumerate(size))
            begin = tuple(first + (cut if one == axis else 0) for one, first in enumerate(offset))
            boxes += [(offset, low), (begin, high)]
        chance.shuffle(boxes)
        assert defect_of(_info(shape, *boxes)) is None, boxes
        index = chance.randrange(len(boxes))
        moved = tuple(max(0, first + chance.randint(-1, 1)) for first in boxes[index][0])
        boxes[index] = chance.choice([(moved, boxes[index][1]), boxes[chance.randrange(len(boxes))]])
        counts = dict.fromkeys(itertools.product(*map(range, shape)), 0)
        outside = 0
        for offset, size in boxes:
            for place in itertools.product(*(range(a, a + n) for a, n in zip(offset, size, strict=True))):
                outside += place not in counts
                counts[place] = counts.get(place, 0) + 1
        exact = not outside and set(counts.values()) == {1}
        assert (defect_of(_info(shape, *boxes)) is None) == exact, (shape, boxes)


def test_a_piece_named_twice_is_refused(tmp_path: Path) -> None:
    """Eight rows in two pieces, the second put where the first is: the elements' number is right, four rows of the
    result would be whatever was in memory before."""
    place = folder(tmp_path)
    writer = TensorWriter(place, piece_bytes=4 * 4 * 3)
    writer.write("w", torch.ones(8, 3))
    write_metadata(place, [writer.close()])
    info = TensorReader(tmp_path).tensors["w"]
    first, second = info.pieces
    hidden = replace(info, pieces=[first, replace(second, offset=first.offset)])
    # storage is found by the offset: both pieces are the first one's bytes
    (tmp_path / ".metadata").write_bytes(pickled_metadata({"w": hidden}))
    with pytest.raises(CheckpointError, match=r"\.metadata: w: the pieces at \(0, 0\) .* overlap"):
        TensorReader(tmp_path).read("w")


def test_pieces_that_overlap_are_not_recorded(tmp_path: Path) -> None:
    """Two ranks that both think they own a row."""
    place = folder(tmp_path)
    writers = [TensorWriter(place, rank) for rank in range(2)]
    writers[0].write("w", torch.ones(4, 3), (0, 0), (8, 3))
    writers[1].write("w", torch.ones(4, 3), (3, 0), (8, 3))
    with pytest.raises(CheckpointError, match=r"w was not written as it is: the pieces .* overlap"):
        write_metadata(place, [writer.close() for writer in writers])


@pytest.mark.parametrize("shape", [(1 << 50, 1), (1, 1 << 50)])
def test_a_tensor_larger_than_its_file_takes_no_memory(shape: tuple[int, ...], tmp_path: Path) -> None:
    (tmp_path / "__0_0.distcp").write_bytes(bytes(1000))
    piece = Piece((0, 0), shape, "__0_0.distcp", 0, 1000)
    (tmp_path / ".metadata").write_bytes(pickled_metadata({"w": TensorInfo(shape, torch.float32, [piece])}))
    with pytest.raises(CheckpointError, match=r"bytes lie in 1000 from 0 on of __0_0\.distcp, which has 1000"):
        TensorReader(tmp_path).read("w")
