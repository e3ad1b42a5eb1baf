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
