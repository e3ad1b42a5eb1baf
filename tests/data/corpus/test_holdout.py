"""What is held out of a corpus: spread over it, shared with no training sample, and nothing else left out."""

import pickle
from itertools import pairwise

import numpy as np
import pytest

from illada_megatron.data.corpus.blend import BlendSchedule
from illada_megatron.data.corpus.blended_corpus import BlendedCorpus
from illada_megatron.data.corpus.configured import held_out_names
from illada_megatron.data.corpus.corpus import Corpus
from illada_megatron.data.corpus.fingerprint import differences, fingerprints
from illada_megatron.data.corpus.holdout import held_out_ranges
from illada_megatron.data.errors import DataError

LENGTH = 16
TOKENS = 3000  # a token's value is its place
DOCUMENTS = [7, 30, 1, 62] * 30


@pytest.fixture
def prefix(write_shard):
    """Three shards of documents of several lengths, whose ends are none of ranges or windows."""
    documents = [range(end - size, end) for size, end in zip(DOCUMENTS, np.cumsum(DOCUMENTS).tolist(), strict=True)]
    for number, part in enumerate((documents[:41], documents[41:83], documents[83:])):
        write_shard(f"shard-{number}", part, vocab_size=4000)
    return str(write_shard("shard-0", documents[:41], vocab_size=4000))[:-1] + "*"


def _corpus(prefix, part, holdout_tokens, length=LENGTH, shuffle=None) -> Corpus:
    shuffle = part == "training" if shuffle is None else shuffle
    return Corpus([prefix], length, 7, shuffle, vocab_size=4000, holdout_tokens=holdout_tokens, part=part)


@pytest.mark.parametrize("holdout_tokens", [16, 40, 250, 500, 1999, 2980])
def test_every_token_is_trained_on_or_held_out(prefix, holdout_tokens: int) -> None:
    """Over epochs whose windows begin at other phases: a range too long by a token would be trained on as well."""
    training, held_out = (_corpus(prefix, part, holdout_tokens) for part in ("training", "validation"))
    ranges = training.held_out
    assert holdout_tokens - ranges.count < ranges.count * ranges.length <= holdout_tokens
    kept = np.setdiff1d(
        np.arange(TOKENS),
        np.concatenate([np.arange(ranges.length) + ranges.first(number) for number in range(ranges.count)]),
    )
    assert training.num_tokens == len(kept) == TOKENS - ranges.count * ranges.length
    seen = set()
    for index in range(5 * training.num_windows):
        sample = training[index]
        place = int(np.searchsorted(kept, sample[0]))
        assert np.array_equal(sample, kept[place : place + LENGTH]), "what is left is not read in its order"
        seen.update(sample.tolist())
    assert set(kept[LENGTH : -2 * LENGTH].tolist()) <= seen  # every epoch's phase leaves out less at the ends
    validated = np.stack([held_out[index] for index in range(held_out.num_windows)])
    assert np.array_equal(validated, validated[:, :1] + np.arange(LENGTH)), "a held-out window runs over two ranges"
    assert not seen & set(validated.ravel().tolist())
    assert held_out.num_windows == ranges.count * (ranges.length // LENGTH)


def test_ranges_are_spread_over_a_corpus_that_is_sorted_by_source(prefix) -> None:
    """Each tenth of the corpus is represented; the tail would be all of the last one."""
    held_out = _corpus(prefix, "validation", 480)
    places = np.concatenate([held_out[index] for index in range(held_out.num_windows)])
    tenths = np.bincount(places * 10 // TOKENS, minlength=10)
    assert held_out.held_out.count == 16
    assert tenths.min() >= LENGTH  # sixteen windows over ten tenths
    assert tenths.max() <= 2 * LENGTH
    firsts = [held_out.held_out.first(number) for number in range(16)]
    gaps = {after - before for before, after in pairwise(firsts)}
    assert max(gaps) - min(gaps) <= 1


def test_what_was_read_is_found_again(prefix) -> None:
    """Documents and places of samples, where the ranges cut documents and shards."""
    starts = np.cumsum([0, *DOCUMENTS])
    for part in ("training", "validation"):
        corpus = _corpus(prefix, part, 500)
        joins = 0
        for index in range(2 * corpus.num_windows):
            sample = corpus[index]
            expected = {int(place) for place in np.flatnonzero(np.isin(sample, starts))} - {0}
            cuts = {int(place) for place in np.flatnonzero(np.diff(sample) != 1) + 1}
            joins += len(cuts)
            assert corpus.document_starts(index).tolist() == sorted(expected | cuts)
            assert corpus.begins_document(index) == (sample[0] in starts)
            pieces = corpus.origin(index).pieces
            assert sum(piece.end_token - piece.first_token for piece in pieces) == LENGTH
            firsts = {f"{prefix[:-1]}{number}": first for number, first in enumerate(_shard_firsts())}
            read = [np.arange(piece.first_token, piece.end_token) + firsts[piece.prefix] for piece in pieces]
            assert np.array_equal(np.concatenate(read), sample)
        assert (joins > 0) == (part == "training")


def _shard_firsts() -> list[int]:
    return [0, sum(DOCUMENTS[:41]), sum(DOCUMENTS[:83])]


def test_batches_equal_samples_and_survive_another_process(prefix) -> None:
    """Windows over a cut are read in pieces, the others at once; both into rows of either integer type."""
    corpus = _corpus(prefix, "training", 500)
    indices = list(range(50))
    for dtype in (np.int64, np.int32):
        batch = np.empty((50, LENGTH), dtype=dtype)
        corpus.read(indices, batch)
        assert np.array_equal(batch, [corpus[index] for index in indices])
    again = pickle.loads(pickle.dumps(corpus))
    assert all(np.array_equal(again[index], corpus[index]) for index in indices)


def test_nothing_held_out_is_the_order_of_old(prefix) -> None:
    """Also what a checkpoint keeps of it: runs of older versions go on."""
    plain = _corpus(prefix, "training", 0)
    # what commit 9f8b812 gives
    assert [int(plain[i][0]) for i in (0, 1, 61, 62, 10**9)] == [436, 548, 2948, 1892, 2661]
    assert set(_fingerprint(plain)["data"]) == {"corpora", "order"}


def test_fingerprints_of_older_holdouts_differ(prefix) -> None:
    """A version that held out the tail trained on what is held out now."""
    now = _fingerprint(_corpus(prefix, "training", 500))
    older = {**now, "data": {key: value for key, value in now["data"].items() if key != "held_out"}}
    assert differences(older, now) == [
        "data.held_out was None, is {'': '16 ranges of 31 tokens, spread evenly'}",
    ]


def _fingerprint(corpus: Corpus) -> dict:
    return fingerprints(BlendedCorpus([corpus], BlendSchedule([(0, [1.0])])), None)


def test_ranges_of_large_corpora() -> None:
    """Few and long, and the same for every sequence length: a stage with longer sequences holds out what was held out
    before. Whole numbers at 12T tokens, where floats would be off."""
    total = 12 * 10**12 + 7
    assert [held_out_ranges(total, length, 10**9) for length in (512, 8192, 65_536)] == 3 * [
        held_out_ranges(total, 1, 10**9)
    ]
    ranges = held_out_ranges(total, 8192, 10**9)
    assert (ranges.count, ranges.length) == (1024, 976_562)
    stretches = ranges.training()
    assert sum(end - first for first, end in stretches) == total - 1024 * 976_562
    assert stretches[-1][1] == total
    assert (held_out_ranges(total, 8192, 10**7).count, held_out_ranges(total, 8192, 10**5).count) == (152, 12)


def test_too_little_is_an_error(prefix) -> None:
    for holdout_tokens in (15, 3001):
        with pytest.raises(DataError, match=rf"data\.holdout_tokens is {holdout_tokens}, expected at least one window"):
            _corpus(prefix, "training", holdout_tokens)
    with pytest.raises(DataError, match=r"3000 tokens in all, 8 in the training part, expected at least one window"):
        _corpus(prefix, "training", 2999)


def test_names_of_paths() -> None:
    assert held_out_names(["demo/shards/heldout.manifest.json"]) == ["heldout"]
    assert held_out_names(["data/web/test", "s3://bucket/code/test.manifest.json", "data/math/shard_*"]) == [
        "web/test",
        "code/test",
        "math/shard",
    ]
    assert held_out_names(["data/web_*", "data/code_*"]) == ["web", "code"]
    assert held_out_names(["*", "a/*"]) == ["", "a"]
    assert held_out_names(["*", "?"]) == ["text-1", "text-2"]
