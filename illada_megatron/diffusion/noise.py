"""Counter-based noise: every random choice is a pure function of (seed, purpose, index).

Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a 256-bit counter and a
128-bit key into four 64-bit words. Here

    key     = (seed, blake2b-64(purpose))       low word first
    counter = (block, index, 0, 0)              low word first; block runs 1, 2, 3, ... within a stream

so two streams share no counter value, whatever their lengths, and no generator's state is ever saved or sent. Of
numpy only the raw words are used: that stream is guaranteed not to change (NEP 19), its distributions' are not.
"""

from functools import lru_cache
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

_WORD = 1 << 64
# Of the same paper: table 2's multipliers, and the Weyl sequence of the keys
_MULTIPLIERS = np.array([0xD2E7470EE14C6C93, 0xCA5A826395121157], np.uint64)[:, None, None]
_KEY_STEPS = np.array([0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B], np.uint64)[:, None, None]
_HALF, _LOW_HALF = np.uint64(32), np.uint64(0xFFFFFFFF)
_ROUNDS = 10


@lru_cache(maxsize=1024)
def _key(seed: int, purpose: str) -> int:
    if not 0 <= seed < _WORD:
        raise ValueError(f"a seed must be in [0, 2**64), found {seed}")
    return seed + (int.from_bytes(blake2b(purpose.encode(), digest_size=8).digest(), "little") << 64)


def philox(seed: int, purpose: str, index: int) -> np.random.Philox:
    """The stream of `index` (a sample's, a group's, a step's) for `purpose`.

    Raises:
        ValueError: seed or index outside [0, 2**64).
    """
    index = int(index)  # a numpy integer would overflow, silently, in the shift below
    if not 0 <= index < _WORD:
        raise ValueError(f"an index must be in [0, 2**64), found {index} (purpose {purpose!r})")
    return np.random.Philox(key=_key(seed, purpose), counter=index << 64)


def words(seed: int, purpose: str, index: int, count: int) -> NDArray[np.uint64]:
    """First `count` words of a stream, `[count]`, uniform over the 64-bit integers."""
    return philox(seed, purpose, index).random_raw(count)


def uniforms(seed: int, purpose: str, index: int, count: int) -> NDArray[np.float64]:
    """First `count` uniforms in [0, 1) of a stream, `[count]`: the top 53 bits of each word."""
    return (words(seed, purpose, index, count) >> np.uint64(11)) * np.float64(2.0**-53)


def words_of_many(seed: int, purpose: str, indices: NDArray[np.int64], count: int) -> NDArray[np.uint64]:
    """`words` of many streams, `[n, count]`, at once: numpy's generator takes some microseconds a stream to set up,
    this about one for all that a sample needs. indices `[n]`, none negative."""
    blocks = -(-count // 4)
    shape = (2, len(indices), blocks)
    # of the counter the words 0 and 2, then 1 and 3
    even, odd = np.zeros(shape, np.uint64), np.zeros(shape, np.uint64)
    even[0], odd[0] = np.arange(1, blocks + 1), indices.astype(np.uint64)[:, None]
    key = _key(seed, purpose)
    keys = np.array([key % _WORD, key // _WORD], np.uint64)[:, None, None]
    for _ in range(_ROUNDS):
        high, low = _products(even)
        even, odd = high[::-1] ^ odd ^ keys, low[::-1]
        keys = keys + _KEY_STEPS
    drawn = np.stack((even[0], odd[0], even[1], odd[1]), axis=-1)
    return drawn.reshape(len(indices), 4 * blocks)[:, :count]


def uniforms_of_many(seed: int, purpose: str, indices: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """`uniforms` of many streams, `[n, count]`."""
    return (words_of_many(seed, purpose, indices, count) >> np.uint64(11)) * np.float64(2.0**-53)


def _products(words: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """High and low words of `words` `[2, ...]` by the two multipliers."""
    a1, a0 = _MULTIPLIERS >> _HALF, _MULTIPLIERS & _LOW_HALF
    b1, b0 = words >> _HALF, words & _LOW_HALF
    cross0, cross1 = a0 * b1, a1 * b0
    carried = (a0 * b0 >> _HALF) + (cross0 & _LOW_HALF) + (cross1 & _LOW_HALF)
    return a1 * b1 + (cross0 >> _HALF) + (cross1 >> _HALF) + (carried >> _HALF), _MULTIPLIERS * words
