"""The keyed bijection: nothing twice, nothing left out, no visible pattern."""

import numpy as np
import pytest

from illada_megatron.data.corpus.order import derive_key, permute

MASK = 2**64 - 1


def mix64(value: int) -> int:
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK
    return value ^ (value >> 31)


def permute_in_python(index: int, n: int, key: int) -> int:
    """The definition, as plain as it goes."""
    if n == 1:
        return 0
    bits = max(2, (n - 1).bit_length())
    low_bits = bits // 2
    keys = [mix64(key + (i + 1) * 0x9E3779B97F4A7C15 & MASK) for i in range(12)]
    while True:
        low, high = index & ((1 << low_bits) - 1), index >> low_bits
        for i in range(0, 12, 2):
            low ^= mix64(high ^ keys[i]) >> (64 - low_bits)
            high ^= mix64(low ^ keys[i + 1]) >> (64 - (bits - low_bits))
        index = high << low_bits | low
        if index < n:
            return index


KEYS = [derive_key(seed, "order", epoch) for seed, epoch in [(0, 0), (1234, 0), (1234, 1)]]


@pytest.mark.parametrize("key", [0, 2**64 - 1, *KEYS])
def test_bijection_for_every_small_n(key: int) -> None:
    """Each of 1..300: all powers of two and their neighbours, both parities of the number of bits."""
    for n in range(1, 301):
        assert sorted(permute(i, n, key) for i in range(n)) == list(range(n)), n


@pytest.mark.parametrize("n", [4095, 4096, 4097, 65_537, 100_003])
def test_bijection_for_larger_n(n: int) -> None:
    assert np.array_equal(np.sort([permute(i, n, KEYS[0]) for i in range(n)]), np.arange(n))


@pytest.mark.parametrize("n", [2**40 + 1, 3 * 10**12, 2**63 + 1, 2**64])
def test_huge_n_stays_in_range_without_repeats(n: int) -> None:
    """Corpora of trillions of tokens, and the widest domain there is (a shift by one bit too many would show)."""
    indices = [*range(1000), *range(n - 1000, n)]
    values = [permute(i, n, KEYS[0]) for i in indices]
    assert len(set(values)) == 2000
    assert 0 <= min(values) < n // 20
    assert n - n // 20 < max(values) < n


@pytest.mark.parametrize("key", [0, 2**64 - 1, *KEYS])
def test_the_compiled_permutation_is_the_defined_one(key: int) -> None:
    """For every size of the domain up to the widest: runs that are resumed must not be reordered."""
    generator = np.random.default_rng(0)
    sizes = [*range(1, 70), *(2**bits + d for bits in range(7, 64) for d in (-1, 0, 1)), 3 * 10**12, 2**64 - 1, 2**64]
    for n in sizes:
        indices = {0, n - 1, n // 2, *(int(x) for x in generator.integers(0, min(n, 2**63 - 1), 4))}
        for index in indices:
            assert permute(index, n, key) == permute_in_python(index, n, key), (index, n)
        if n < 2**63:
            array = np.array(sorted(indices))
            assert permute(array, n, key).tolist() == [permute_in_python(i, n, key) for i in sorted(indices)]


def test_arrays_keep_their_shape_and_are_refused_as_numbers_are() -> None:
    indices = np.arange(12).reshape(3, 4)
    assert permute(indices, 12, 7).tolist() == [[permute(int(i), 12, 7) for i in row] for row in indices]
    assert permute(np.arange(20)[::-2], 20, 7).tolist() == [permute(i, 20, 7) for i in range(19, -1, -2)]
    assert permute(np.zeros(0, dtype=np.int64), 5, 7).shape == (0,)
    for bad in (np.array([0, 5]), np.array([-1])):
        with pytest.raises(IndexError, match="expected 0 to n - 1 = 4"):
            permute(bad, 5, 7)
    for n in (0, 2**63):
        with pytest.raises(ValueError, match="n is"):
            permute(np.array([0]), n, 7)
    with pytest.raises(TypeError):
        permute(np.array([1.0]), 5, 7)


def test_a_known_value_does_not_change() -> None:
    """A change of constants or rounds would silently reorder every run that is resumed."""
    assert [permute(i, 10, 42) for i in range(10)] == [9, 6, 2, 1, 7, 4, 5, 0, 3, 8]
    assert permute(123_456, 10**9, derive_key(1234, "order", 7)) == 758_200_703


def test_keys_differ_by_seed_purpose_and_epoch() -> None:
    orders = {tuple(permute(i, 1000, key) for i in range(1000)) for key in KEYS}
    assert len(orders) == 3
    keys = {derive_key(seed, purpose, n) for seed in range(10) for purpose in ("order", "phase") for n in range(10)}
    assert len(keys) == 200
    assert derive_key(1, "order", 23) != derive_key(12, "order", 3)


def _chi_square(counts: np.ndarray) -> float:
    """Standard deviations above what uniform counts would give (the statistic's mean is dof, its variance 2 dof)."""
    expected = counts.sum() / counts.size
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float((statistic - (counts.size - 1)) / np.sqrt(2 * (counts.size - 1)))


@pytest.mark.parametrize("n", [7, 16, 37])
def test_every_index_goes_everywhere_equally_often(n: int) -> None:
    """Over thousands of keys, [index, place] counts are uniform. A favoured place is a window trained on too often."""
    counts = np.zeros((n, n))
    for seed in range(140_000 // n):
        key = derive_key(seed, "order", 0)
        for i in range(n):
            counts[i, permute(i, n, key)] += 1
    assert all(abs(_chi_square(row)) < 5 for row in counts)


def test_all_permutations_of_a_small_domain_occur_equally_often() -> None:
    """5! = 120 orders: a network with too few rounds reaches some of them only, or prefers the even ones."""
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(12_000):
        key = derive_key(seed, "order", 0)
        order = tuple(permute(i, 5, key) for i in range(5))
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 120
    assert abs(_chi_square(np.array(list(counts.values())))) < 5


def test_neighbours_land_independently() -> None:
    """Of one key: consecutive indices' places, in a 16 x 16 table, are uniform. A linear pattern would fill stripes."""
    n = 50_000
    places = np.array([permute(i, n, KEYS[0]) for i in range(n)])
    cells = places * 16 // n
    counts = np.zeros((16, 16))
    np.add.at(counts, (cells[:-1], cells[1:]), 1)
    assert abs(_chi_square(counts.ravel())) < 5
    assert abs(np.corrcoef(np.arange(n), places)[0, 1]) < 0.02


@pytest.mark.parametrize(("index", "n", "error"), [(-1, 5, IndexError), (5, 5, IndexError), (0, 0, ValueError)])
def test_outside_of_the_domain_is_refused(index: int, n: int, error: type[Exception]) -> None:
    with pytest.raises(error, match="expected"):
        permute(index, n, 1)
