"""The order of an epoch without storing it: a keyed bijection on [0, n), computed for one index at a time.

A Feistel network permutes [0, 2^bits), the smallest power of two that holds n; an index that lands at n or above is
sent through again until it falls below n (cycle walking; Black and Rogaway, "Ciphers with Arbitrary Finite Domains",
2002). Less than two passes are needed on average."""

import hashlib
import operator
from functools import lru_cache

_MASK = (1 << 64) - 1
_GOLDEN_RATIO = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: Steele, Lea, Flood, "Fast Splittable ... Generators", 2014
# each round changes one half; tiny domains mix slowly, so the number is generous
_ROUNDS = 12


def derive_key(seed: int, purpose: str, *numbers: int) -> int:
    """A 64-bit key for one purpose, e.g. derive_key(seed, "order", epoch). Keys of different arguments are
    unrelated (BLAKE2b), and the same on every machine and Python."""
    text = "/".join([str(operator.index(seed)), purpose, *(str(operator.index(number)) for number in numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def permute(index: int, n: int, key: int) -> int:
    """Where `index` in [0, n) goes in the permutation of [0, n) that `key` (64 bits) chooses.

    Raises IndexError when index is not in [0, n), ValueError when n < 1 or n > 2^64."""
    if not 1 <= n <= 1 << 64:
        raise ValueError(f"n is {n}, expected 1 to 2^64")
    if not 0 <= index < n:
        raise IndexError(f"index is {index}, expected 0 to n - 1 = {n - 1}")
    if n == 1:
        return 0
    bits = max(2, (n - 1).bit_length())
    round_keys = _round_keys(key)
    value = _feistel(index, bits, round_keys)
    while value >= n:
        value = _feistel(value, bits, round_keys)
    return value


def _feistel(value: int, bits: int, round_keys: tuple[int, ...]) -> int:
    """A bijection on [0, 2^bits), 2 <= bits <= 64: the halves (of unequal size when bits is odd) take turns, each
    changed by exclusive-or with a hash of the other, which can be undone whatever the hash is."""
    low_bits = bits // 2
    low_mask = (1 << low_bits) - 1
    high_shift = 64 - (bits - low_bits)
    low, high = value & low_mask, value >> low_bits
    low_shift = 64 - low_bits
    for i in range(0, _ROUNDS, 2):
        low ^= _mix64(high ^ round_keys[i]) >> low_shift
        high ^= _mix64(low ^ round_keys[i + 1]) >> high_shift
    return high << low_bits | low


def _mix64(value: int) -> int:
    """The finalizer of SplitMix64 (Stafford's variant 13 of MurmurHash3's): each input bit flips each output bit
    with probability near 1/2."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


@lru_cache(maxsize=64)
def _round_keys(key: int) -> tuple[int, ...]:
    return tuple(_mix64(key + (i + 1) * _GOLDEN_RATIO & _MASK) for i in range(_ROUNDS))
