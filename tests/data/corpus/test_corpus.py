"""Samples: each window once an epoch, the same whatever the shards, the history or the process."""

import multiprocessing
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from illada_megatron.data.corpus.corpus import Corpus
from illada_megatron.data.corpus.statistics import unigram_entropy
from illada_megatron.data.errors import DataError
from illada_megatron.data.shards.indexed_dataset import IndexedDataset
from illada_megatron.data.shards.shard_list import find_shards

LENGTH = 16


@pytest.fixture
def stream() -> np.ndarray:
    """1007 tokens, all different: a token's value is its place in the stream."""
    return np.arange(1007)


def _shards(write_shard, stream: np.ndarray, cuts: list[int], name: str) -> list[Path]:
    pieces = np.split(stream, cuts)
    return [write_shard(f"{name}-{i:03d}", [piece], vocab_size=2000) for i, piece in enumerate(pieces)]


def _corpus(paths: list, seed: int = 7, shuffle: bool = True, length: int = LENGTH) -> Corpus:
    return Corpus(paths, sequence_length=length, seed=seed, shuffle=shuffle, vocab_size=2000)


def test_each_window_once_an_epoch_and_the_edges_move(write_shard, stream) -> None:
    """A window repeated or left out in an epoch, or tokens at the ends that no epoch ever reads."""
    corpus = _corpus(_shards(write_shard, stream, [], "one"))
    assert corpus.num_windows == (1007 - 15) // 16 == 62
    phases, orders, seen = set(), set(), set()
    for epoch in range(40):
        samples = np.stack([corpus[epoch * 62 + i] for i in range(62)])
        assert samples.shape == (62, LENGTH)
        assert samples.dtype == np.int64
        starts = samples[:, 0]
        assert np.array_equal(samples, starts[:, None] + np.arange(LENGTH))
        phase = int(starts.min())
        assert np.array_equal(np.sort(starts), phase + LENGTH * np.arange(62))
        assert 0 <= phase < LENGTH
        phases.add(phase)
        orders.add(tuple((starts - phase) // LENGTH))
        seen.update(samples.ravel().tolist())
    assert len(orders) == 40
    assert len(phases) >= 12
    assert seen == set(range(1007))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("cuts", [[500], [1, 2, 3, 4], list(range(20, 1007, 20)), list(range(1, 1007))])
def test_shards_do_not_matter(write_shard, stream, cuts: list[int], shuffle: bool) -> None:
    """Repacking the corpus (1, 2, 5, 51 or 1007 shards, windows over many of them) must not change a run."""
    one = _corpus(_shards(write_shard, stream, [], "one"), shuffle=shuffle)
    many = _corpus(_shards(write_shard, stream, cuts, "many"), shuffle=shuffle)
    assert len(many.shards) == len(cuts) + 1
    for index in [*range(130), 10**9]:
        assert np.array_equal(one[index], many[index])


def test_id_types_can_be_mixed(write_shard, stream) -> None:
    """uint16 and int32 shards side by side, as after a vocabulary grew."""
    narrow = write_shard("a", [stream[:100]], vocab_size=2000)
    wide = write_shard("b", [stream[100:]], vocab_size=100_000)
    corpus = _corpus([narrow, wide], shuffle=False)
    assert [shard.dtype for shard in corpus.shards] == ["uint16", "int32"]
    assert corpus[6].tolist() == list(range(96, 112))


def test_sample_depends_on_index_and_seed_only(write_shard, stream) -> None:
    """Not on what was read before (a resumed run starts in the middle), nor on the epoch's end being near."""
    paths = _shards(write_shard, stream, [300], "two")
    forward = _corpus(paths)
    expected = [forward[i] for i in range(200)]
    backward = _corpus(paths)
    assert all(np.array_equal(backward[i], expected[i]) for i in reversed(range(200)))
    assert np.array_equal(_corpus(paths)[137], expected[137])
    assert not np.array_equal(np.stack([_corpus(paths, seed=8)[i] for i in range(62)]), np.stack(expected[:62]))


def test_random_access_far_away_is_exact(write_shard, stream) -> None:
    """At sample 10^9 and beyond 2^63: Python's integers and numpy's."""
    corpus = _corpus(_shards(write_shard, stream, [], "one"))
    assert corpus.epoch_of(10**9) == 10**9 // 62
    assert np.array_equal(corpus[np.int64(10**9)], corpus[10**9])
    for first in (10**9 // 62 * 62, 2**70 // 62 * 62):
        starts = sorted(int(corpus[first + i][0]) for i in range(62))
        assert np.diff(starts).tolist() == [LENGTH] * 61
    with pytest.raises(IndexError, match="-1"):
        corpus[-1]
    with pytest.raises(TypeError):
        corpus[1.5]


def test_known_samples_do_not_change(write_shard, stream) -> None:
    """A change of keys, phases or order would make a resumed run repeat some windows and miss others."""
    corpus = _corpus(_shards(write_shard, stream, [], "one"))
    assert [int(corpus[i][0]) for i in (0, 1, 61, 62, 7 * 62 + 5, 10**9)] == [804, 532, 68, 904, 483, 476]


def test_sample_can_be_changed_by_its_reader(write_shard, stream) -> None:
    """Masking writes into the sample; the map under it must neither refuse nor change."""
    corpus = _corpus(_shards(write_shard, stream, [], "one"))
    sample = corpus[0]
    before = sample.copy()
    sample[:] = 5
    assert np.array_equal(corpus[0], before)


def test_unshuffled_reads_the_stream_in_order(write_shard, stream) -> None:
    """Validation: the same windows from token 0 on, every epoch, only the last remainder left out."""
    corpus = _corpus(_shards(write_shard, stream, [], "one"), shuffle=False)
    assert corpus.num_windows == 62
    for epoch in range(3):
        assert np.concatenate([corpus[epoch * 62 + i] for i in range(62)]).tolist() == list(range(992))
    exact = _corpus(_shards(write_shard, stream[:992], [], "exact"), shuffle=False)
    assert exact.num_windows == 62


@pytest.mark.parametrize("tokens", [16, 17, 30, 31, 32, 46, 47, 48])
def test_corpus_of_one_or_two_windows(write_shard, stream, tokens: int) -> None:
    """Where not every phase fits, those that fit are used; nothing is read beyond the end."""
    corpus = _corpus(_shards(write_shard, stream[:tokens], [], "tiny"))
    assert corpus.num_windows == (1 if tokens < 47 else 2)
    starts = [int(corpus[i][0]) for i in range(300)]
    assert set(range(min(LENGTH, tokens - LENGTH * corpus.num_windows + 1))) <= set(starts)
    assert max(starts) + LENGTH <= tokens


def test_too_few_tokens_for_a_window_is_an_error(write_shard, stream) -> None:
    paths = _shards(write_shard, stream[:15], [7], "tiny")
    with pytest.raises(DataError, match=r"tiny-001: 15 tokens in all, expected at least one window of 16"):
        _corpus(paths)
    with pytest.raises(DataError, match="sequence_length is 0"):
        _corpus(paths, length=0)


@pytest.mark.parametrize(("bad", "offset"), [(2000, 0), (65535, 406), (2001, 690)])
def test_id_beyond_the_vocabulary_names_shard_and_offset(write_shard, stream, bad: int, offset: int) -> None:
    """A shard of another tokenizer: an embedding lookup on a GPU would die of it without saying where."""
    stream[300 + offset] = bad
    first = write_shard("first", [stream[:300]], vocab_size=65536)
    second = write_shard("second", [stream[300:]], vocab_size=65536)
    corpus = _corpus([first, second], shuffle=False)
    message = rf"second\.bin: token id {bad} at token offset {offset} is not in the vocabulary of size 2000"
    with pytest.raises(DataError, match=message):
        [corpus[i] for i in range(corpus.num_windows)]
    with pytest.raises(DataError, match=message):
        unigram_entropy([first, second], vocab_size=2000)
    assert corpus[0].tolist() == list(range(16))


def test_paths_are_prefixes_or_globs_in_order(write_shard, tmp_path: Path, monkeypatch) -> None:
    for name in ("b-2", "b-1", "a", "c[1]"):
        write_shard(name, [[1]])
    absolute = [str(tmp_path / name) for name in ("c[1]", "b-1", "b-2", "a")]
    found = find_shards([tmp_path / "c[1]", f"{tmp_path}/b-*", str(tmp_path / "a")])
    assert [shard.prefix for shard in found] == absolute
    monkeypatch.chdir(tmp_path)
    assert [shard.prefix for shard in find_shards(["b-?", "a"])] == ["b-1", "b-2", "a"]


def test_shard_without_index_is_not_skipped_by_a_glob(write_shard, tmp_path: Path) -> None:
    """A copy that is still under way must not shrink the corpus without a word."""
    write_shard("part-0", [[1] * 20])
    Path(f"{write_shard('part-1', [[1] * 20])}.idx").unlink()
    with pytest.raises(DataError, match=r"part-1\.idx: no such file"):
        _corpus([f"{tmp_path}/part-*"])


def test_wrong_paths_are_errors(write_shard, tmp_path: Path) -> None:
    prefix = write_shard("part-0", [[1] * 20])
    with pytest.raises(DataError, match=r"no shards were given.*data\.train_paths"):
        _corpus([])
    with pytest.raises(DataError, match=re.escape(f"{tmp_path}/nothing-*: no shard matches")):
        _corpus([f"{tmp_path}/nothing-*"])
    with pytest.raises(DataError, match=r"nothing\.bin: no such file"):
        _corpus([tmp_path / "nothing"])
    with pytest.raises(DataError, match=r"part-0: this shard is listed 2 times"):
        _corpus([prefix, f"{tmp_path}/part-*"])


def _sample(corpus: Corpus, index: int) -> list[int]:
    return corpus[index].tolist()


def test_spawned_process_reads_the_same_samples(write_shard, stream) -> None:
    """Another process, another hash seed; what it is sent is paths, not tokens."""
    corpus = _corpus(_shards(write_shard, stream, [100, 800], "three"))
    assert len(pickle.dumps(corpus)) < 5000
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_sample, (corpus, 12345)) == corpus[12345].tolist()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_dropped_corpus_closes_its_files(write_shard, stream) -> None:
    """Thousands of shards, opened again for each validation, would use up the file descriptors."""
    paths = _shards(write_shard, stream, list(range(100, 1000, 100)), "ten")
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 (a count is all that is wanted)
    for _ in range(5):
        _corpus(paths)[3]
    assert len(os.listdir("/proc/self/fd")) <= before  # noqa: PTH208


def test_unigram_entropy_by_hand(write_shard) -> None:
    """3 of 4 tokens are 1, 1 of 4 is 2, over two shards: 0.75 ln(4/3) + 0.25 ln 4. Two equal tokens: ln 2."""
    first, second = write_shard("first", [[1, 1, 2]]), write_shard("second", [[1]])
    assert unigram_entropy([first, second], 1000) == pytest.approx(0.75 * np.log(4 / 3) + 0.25 * np.log(4), rel=1e-12)
    assert unigram_entropy([write_shard("equal", [[5, 9] * 50])], 10) == pytest.approx(np.log(2), rel=1e-12)
    assert IndexedDataset(first).num_tokens == 3
