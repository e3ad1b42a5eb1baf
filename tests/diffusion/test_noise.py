"""The noise behind every random choice: what it is, bit for bit, and that its streams do not meet."""

from hashlib import blake2b

import numpy as np
import pytest

from illada_megatron.diffusion import philox, uniforms, words

MASK64 = (1 << 64) - 1


def philox4x64(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10 from its paper's definition, in Python's integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(c[0] * 0xD2E7470EE14C6C93, 1 << 64)
        high1, low1 = divmod(c[2] * 0xCA5A826395121157, 1 << 64)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B97F4A7C15) & MASK64, (k[1] + 0xBB67AE8584CAA73B) & MASK64]
    return c


def test_python_philox_agrees_with_random123s_known_answer():
    """The published vector of the reference implementation (Random123, kat_vectors): all words of counter, key 0."""
    assert philox4x64([0] * 4, [0] * 2) == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]


@pytest.mark.parametrize(
    ("seed", "purpose", "index"), [(0, "a", 0), (1234, "diffusion.mask", 77), (2**64 - 1, "é", 2**40)]
)
def test_words_are_philox_at_the_documented_key_and_counter(seed, purpose, index):
    """Whatever numpy is installed, checkpoints from years ago must meet the same noise."""
    key = [seed, int.from_bytes(blake2b(purpose.encode(), digest_size=8).digest(), "little")]
    expected = [word for block in (1, 2, 3) for word in philox4x64([block, index, 0, 0], key)]
    assert words(seed, purpose, index, 12).tolist() == expected
    assert uniforms(seed, purpose, index, 12).tolist() == [(word >> 11) / 2**53 for word in expected]


def test_streams_of_neighbours_do_not_overlap():
    """A stream advanced past any sequence length does not run into the next sample's."""
    streams = [set(words(7, "purpose", index, 50_000).tolist()) for index in range(4)]
    assert len(set.union(*streams)) == 4 * 50_000


def test_seed_purpose_and_index_each_matter():
    base = words(1, "mask", 2, 8)
    for other in (words(2, "mask", 2, 8), words(1, "t", 2, 8), words(1, "mask", 3, 8)):
        assert not np.any(base == other)


def test_numpy_integers_are_indices_too():
    for kind in (np.int64, np.int32, np.uint64):
        assert np.array_equal(words(1, "mask", kind(9), 8), words(1, "mask", 9, 8))


def test_uniforms_are_uniform_and_below_one():
    u = uniforms(5, "purpose", 1, 200_000)
    assert u.dtype == np.float64
    assert u.min() >= 0
    assert u.max() < 1
    steps = np.arange(1, u.size + 1) / u.size
    assert np.abs(np.sort(u) - steps).max() * np.sqrt(u.size) < 1.95  # Kolmogorov-Smirnov, p = 0.001


def test_streams_are_uncorrelated():
    draws = np.stack([uniforms(seed, name, index, 20_000) for seed in (1, 2) for name in "ab" for index in (0, 1)])
    correlation = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(correlation).max() < 4.5 / np.sqrt(draws.shape[1])


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (2**64, 0), (0, -1), (0, 2**64)])
def test_out_of_range(seed, index):
    with pytest.raises(ValueError, match=r"must be in \[0, 2\*\*64\), found"):
        philox(seed, "purpose", index)
