"""The order of an epoch without storing it: a keyed bijection on [0, n), computed for one index at a time.

A Feistel network permutes [0, 2^bits), the smallest power of two that holds n; an index that lands at n or above is
sent through again until it falls below n (cycle walking; Black and Rogaway, "Ciphers with Arbitrary Finite Domains",
2002). Less than two passes are needed on average.

The index's bits are split in two halves (unequal when their number is odd), which take turns: each is changed by
exclusive-or with a hash of the other and a round key, which can be undone whatever the hash is. The hash is the
finalizer of SplitMix64 (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", 2014; Stafford's
variant 13 of MurmurHash3's): each input bit flips each output bit with probability near 1/2. It is computed by
csrc/indexed_dataset/permutation.cpp and spelled out in Python by tests/data/corpus/test_order.py."""

import hashlib
import operator
from typing import Any, overload

import numpy as np

from illada_megatron.data.shards import _indexed_dataset

Indices = np.ndarray[Any, np.dtype[np.int64]]
_KEY_MASK = (1 << 64) - 1


def derive_key(seed: int, purpose: str, *numbers: int) -> int:
    """A 64-bit key for one purpose, e.g. derive_key(seed, "order", epoch). Keys of different arguments are
    unrelated (BLAKE2b), and the same on every machine and Python."""
    text = "/".join([str(operator.index(seed)), purpose, *(str(operator.index(number)) for number in numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@overload
def permute(index: int, n: int, key: int) -> int: ...
@overload
def permute(index: Indices, n: int, key: int) -> Indices: ...
def permute(index: int | Indices, n: int, key: int) -> int | Indices:
    """Where `index` in [0, n) goes in the permutation of [0, n) that `key` (64 bits) chooses; for an int64 array, where
    each of its entries goes (a new array of the same shape).

    Raises IndexError when an index is not in [0, n), ValueError when n < 1 or n > 2^64 (for an array: n >= 2^63)."""
    if isinstance(index, np.ndarray):
        if not 1 <= n < 1 << 63:
            raise ValueError(f"n is {n}, expected 1 to 2^63 - 1 for an array of indices")
        return _indexed_dataset.permute(index, n, key & _KEY_MASK)
    if not 1 <= n <= 1 << 64:
        raise ValueError(f"n is {n}, expected 1 to 2^64")
    if not 0 <= index < n:
        raise IndexError(f"index is {index}, expected 0 to n - 1 = {n - 1}")
    return _indexed_dataset.permute_one(operator.index(index), n - 1, key & _KEY_MASK)
