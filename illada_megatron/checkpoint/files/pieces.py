"""Whether the pieces of a tensor make it up: every element lies in exactly one of them."""

import math
from collections.abc import Sequence

import numpy as np

from illada_megatron.checkpoint.files.metadata import Piece, TensorInfo

_MOST_ELEMENTS = 1 << 60
"""So that their bytes fit into 63 bits."""


def defect_of(info: TensorInfo) -> str | None:
    """What is wrong with a tensor's pieces; None: each element is in one of them and in no other."""
    total = math.prod(info.shape)
    if total >= _MOST_ELEMENTS:
        return f"shape {_short(info.shape)} is of more elements than any file holds"
    filled = [piece for piece in info.pieces if math.prod(piece.shape)]
    for piece in filled:
        if not len(piece.shape) == len(piece.offset) == len(info.shape) or any(
            first + length > whole for first, length, whole in zip(piece.offset, piece.shape, info.shape, strict=True)
        ):
            return f"the piece {_box(piece)} does not lie in it, shape {_short(info.shape)}"
    if (held := sum(math.prod(piece.shape) for piece in filled)) < total:
        return f"{held} of its {total} elements are there"
    if held > total:
        return f"its pieces overlap: they hold {held} elements, it has {total}"
    # as many elements as there are, and all within: what is missing is there twice
    if (pair := _overlapping(filled)) is not None:
        return f"the pieces {_box(pair[0])} and {_box(pair[1])} overlap"
    return None


def _overlapping(pieces: Sequence[Piece]) -> tuple[Piece, Piece] | None:
    """Two pieces, of the same number of dimensions, with an element in common."""
    if len(pieces) < 2:
        return None
    if not pieces[0].shape:
        return pieces[0], pieces[1]  # a scalar twice
    first = np.array([piece.offset for piece in pieces], dtype=np.int64)
    end = first + np.array([piece.shape for piece in pieces], dtype=np.int64)
    # along the dimension that is cut most often: what is cut into columns would else be compared each with each
    axis = max(range(first.shape[1]), key=lambda one: len(np.unique(first[:, one])))
    order = np.argsort(first[:, axis], kind="stable")
    first, end = first[order], end[order]
    # a piece can only meet those behind it that begin before its end
    behind = np.searchsorted(first[:, axis], end[:, axis])
    for one in np.flatnonzero(behind > np.arange(len(pieces)) + 1):
        others = slice(one + 1, behind[one])
        meets = ((first[others] < end[one]) & (end[others] > first[one])).all(1)
        if meets.any():
            return pieces[order[one]], pieces[order[one + 1 + int(meets.argmax())]]
    return None


def _box(piece: Piece) -> str:
    return f"at {_short(piece.offset)} of shape {_short(piece.shape)}"


def _short(numbers: Sequence[int]) -> str:
    return f"{tuple(numbers[:8])}" + (" ..." if len(numbers) > 8 else "")
