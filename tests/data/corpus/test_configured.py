"""What a configuration's data section becomes: blends, phases, epochs, and validation that shares nothing."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from illada_megatron.config.schema import DataConfig
from illada_megatron.data.corpus.configured import epoch_problems, held_out_corpora, training_corpus
from illada_megatron.data.errors import DataError
from illada_megatron.data.shards.indexed_dataset import IndexedDataset
from illada_megatron.data.shards.manifest import Manifest, ShardEntry, file_checksum, write_manifest
from illada_megatron.data.tokenizers.tokenizer import load_tokenizer

LENGTH = 16


@pytest.fixture
def shards(write_shard) -> dict[str, str]:
    """Three corpora whose token values say where they come from: web 0.., code 10000.., math 20000.."""
    sizes = {"web": 3000, "code": 1000, "math": 500}
    return {
        name: str(write_shard(name, [range(10_000 * number, 10_000 * number + size)], vocab_size=30_000))
        for number, (name, size) in enumerate(sizes.items())
    }


def _blend(shards: dict[str, str], **fields) -> DataConfig:
    weights = {"web": 0.5, "code": 0.3, "math": 0.2}
    entries = [{"name": name, "paths": [path], "weight": weights[name]} for name, path in shards.items()]
    return DataConfig.model_validate({"blend": entries, "sequence_length": LENGTH, **fields})


def _training(data: DataConfig, seed: int = 3):
    return training_corpus(data, seed, 30_000, tokenizer=None)


def test_blend_takes_samples_in_proportion_and_each_corpus_in_its_own_order(shards) -> None:
    corpus = _training(_blend(shards))
    samples = [corpus[i] for i in range(400)]
    assert Counter(int(sample[0]) // 10_000 for sample in samples) == {0: 200, 1: 120, 2: 80}
    for number, part in enumerate(corpus.corpora):
        mine = [sample for sample in samples if sample[0] // 10_000 == number]
        assert all(np.array_equal(part[j], sample) for j, sample in enumerate(mine))
    batch = np.empty((5, LENGTH), dtype=np.int64)
    corpus.read([7, 399, 0, 7, 123], batch)
    assert np.array_equal(batch, [samples[i] for i in (7, 399, 0, 7, 123)])
    assert corpus.epochs(400) == {
        name: count / part.num_windows
        for (name, count), part in zip({"web": 200, "code": 120, "math": 80}.items(), corpus.corpora, strict=True)
    }


def test_another_corpus_in_the_blend_leaves_the_others_orders_alone(shards) -> None:
    full = _training(_blend(shards))
    fewer = _training(_blend({name: shards[name] for name in ("code", "math")}))
    assert np.array_equal(full.corpora[1][17], fewer.corpora[0][17])
    assert not np.array_equal(
        [full.corpora[1][i][0] % 1000 for i in range(20)], [full.corpora[2][i][0] % 1000 for i in range(20)]
    )


def test_phases_begin_at_token_counts(shards) -> None:
    data = _blend(shards, phases=[{"from_tokens": 100 * LENGTH - 3, "weights": {"math": 2, "code": 2}}])
    plain, annealed = _training(_blend(shards)), _training(data)
    assert all(np.array_equal(plain[i], annealed[i]) for i in range(100))
    later = Counter(int(annealed[i][0]) // 10_000 for i in range(100, 200))
    assert later == {1: 50, 2: 50}


def test_epochs_beyond_the_cap_are_named(shards) -> None:
    data = _blend(shards)
    capped = data.model_copy(update={"blend": [entry.model_copy(update={"max_epochs": 2.0}) for entry in data.blend]})
    corpus = _training(capped)
    windows = corpus.corpora[2].num_windows
    assert epoch_problems(corpus, capped, 5 * 2 * windows) == []
    (problem,) = epoch_problems(corpus, capped, 5 * 2 * windows + 5)
    assert re.search(rf"math would be read 2\.0\d times by sample {10 * windows + 5}, max_epochs is 2", problem)
    single = DataConfig(train_paths=[shards["math"]], sequence_length=LENGTH, max_epochs=1.5)
    assert epoch_problems(_training(single), single, 1000)[0].startswith("data.train_paths would be read")


def test_held_out_range_and_training_share_no_token(shards) -> None:
    """Over several epochs, whose windows begin at different phases."""
    data = _blend(shards, holdout_tokens=200)
    corpus, held_out = _training(data), held_out_corpora(data, seed=3, vocab_size=30_000, tokenizer=None)
    trained = set(np.concatenate([corpus[i] for i in range(3000)]).tolist())
    assert [one.name for one in held_out] == ["web", "code", "math"]
    for number, one in enumerate(held_out):
        validated = np.concatenate([one[i] for i in range(one.num_windows)])
        assert not trained & set(validated.tolist())
        # 200 tokens are 12 windows of each corpus, in stream order and spread over it
        assert one.num_windows == 12
        assert set(validated // 10_000) == {number}
        assert np.ptp(np.diff(validated[::LENGTH])) <= 1
    assert len(trained) > 4500 - 3 * (200 + 2 * LENGTH)
    with pytest.raises(DataError, match=r"math: 500 tokens in all, 4 in the training part.*holdout_tokens is 496"):
        _training(_blend(shards, holdout_tokens=496))


def test_held_out_shards_are_not_training_shards(shards, tmp_path: Path) -> None:
    """Under whatever name: another spelling of the path, a link, a manifest."""
    data = DataConfig(train_paths=[shards["web"]], validation_paths=[shards["code"]], sequence_length=LENGTH)
    (held_out,) = held_out_corpora(data, 1, 30_000, None)
    assert (held_out.name, int(held_out[1][0])) == ("code", 10_000 + LENGTH)
    _training(data)
    for suffix in (".bin", ".idx"):
        (tmp_path / f"link{suffix}").symlink_to(f"{shards['web']}{suffix}")
    entry = ShardEntry(path="web", dtype="uint16", tokens=3000, documents=1)
    write_manifest(Manifest(vocab_size=30_000, shards=(entry,)), tmp_path / "web.manifest.json")
    for same in (
        shards["web"],
        f"{tmp_path}/../{tmp_path.name}/web",
        tmp_path / "link",
        tmp_path / "web.manifest.json",
    ):
        with pytest.raises(DataError, match=r"this validation shard is the training shard .*web"):
            _training(data.model_copy(update={"validation_paths": [str(same)]}))


def test_tokenizer_of_the_manifest_is_compared(shards, tmp_path: Path, sentencepiece_path: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_path)
    entry = ShardEntry(path="web", dtype="uint16", tokens=3000, documents=1)
    path = tmp_path / "web.manifest.json"
    data = DataConfig(train_paths=[str(path)], sequence_length=LENGTH)
    write_manifest(Manifest(vocab_size=30_000, tokenizer_sha256=tokenizer.fingerprint, shards=(entry,)), path)
    training_corpus(data, 1, 30_000, tokenizer)
    with pytest.raises(DataError, match=r"a vocabulary of 30000, model\.vocab_size is 8000"):
        training_corpus(data, 1, 8000, tokenizer)
    write_manifest(Manifest(vocab_size=30_000, tokenizer_sha256="0" * 64, shards=(entry,)), path)
    training_corpus(data, 1, 30_000, None)
    with pytest.raises(DataError, match=r"tokenizer of SHA-256 0000000000000000…, data\.tokenizer_path is"):
        training_corpus(data, 1, 30_000, tokenizer)


@pytest.mark.parametrize("with_tokenizer", [True, False])
@pytest.mark.parametrize("wrong", ["code", "held_out"])
def test_shards_of_two_tokenizers_are_refused(
    shards, tmp_path: Path, sentencepiece_path: Path, with_tokenizer: bool, wrong: str
) -> None:
    """Two training corpora, or validation shards: ids that mean other words would be read without a word. Also where
    the run itself knows no tokenizer."""
    tokenizer = load_tokenizer(sentencepiece_path)
    paths = {}
    for name, shard in (("web", "web"), ("code", "code"), ("held_out", "math")):
        fingerprint = "0" * 64 if name == wrong else tokenizer.fingerprint
        entry = ShardEntry(path=shard, dtype="uint16", tokens=IndexedDataset(shards[shard]).num_tokens, documents=1)
        paths[name] = str(tmp_path / f"{name}.manifest.json")
        write_manifest(Manifest(vocab_size=30_000, tokenizer_sha256=fingerprint, shards=(entry,)), paths[name])
    blend = [{"name": name, "paths": [paths[name]], "weight": 1} for name in ("web", "code")]
    fields = {"blend": blend, "validation_paths": [paths["held_out"]], "sequence_length": LENGTH}
    data = DataConfig.model_validate(fields)
    known = tokenizer if with_tokenizer else None
    other = "data.tokenizer_path is" if with_tokenizer else "web.manifest.json with that of"
    with pytest.raises(DataError, match=rf"{wrong}\.manifest\.json: was written with the tokenizer of .*{other}"):
        training_corpus(data, 1, 30_000, known)
    if with_tokenizer and wrong == "held_out":  # as `illada evaluate` opens it
        with pytest.raises(DataError, match=rf"{wrong}\.manifest\.json: was written with the tokenizer of .*{other}"):
            held_out_corpora(data, 1, 30_000, known)
    else:
        held_out_corpora(data, 1, 30_000, known)
    with pytest.raises(DataError, match=r"held_out\.manifest\.json: was written with a vocabulary of 30000"):
        held_out_corpora(data, 1, 29_999, None)


def test_a_tokenizer_that_was_saved_again_can_be_allowed(shards, tmp_path: Path, sentencepiece_path: Path) -> None:
    """Its file has another SHA-256 and the same ids: the error says what to set, and with that it is a warning."""
    entry = ShardEntry(path="web", dtype="uint16", tokens=3000, documents=1)
    path, tokenizer = tmp_path / "web.manifest.json", load_tokenizer(sentencepiece_path)
    write_manifest(Manifest(vocab_size=30_000, tokenizer_sha256="0" * 64, shards=(entry,)), path)
    data = DataConfig(train_paths=[str(path)], sequence_length=LENGTH, holdout_tokens=100)
    for make in (training_corpus, held_out_corpora):
        for allowed in ([], ["model", "data"]):
            with pytest.raises(DataError, match=r"tokenizer_sha256 in the manifest.*allow_mismatch=\[\"tokenizer\"\]"):
                make(data, 1, 30_000, tokenizer, allowed)
        made = make(data, 1, 30_000, tokenizer, ["tokenizer"])
        if make is training_corpus:
            (warning,) = made.warnings
            assert re.search(r"web\.manifest\.json: was written with the tokenizer of SHA-256 0{16}…, data", warning)
        with pytest.raises(DataError, match=r"a vocabulary of 30000, model\.vocab_size is 8000"):
            make(data, 1, 8000, tokenizer, ["tokenizer"])


def test_a_shard_in_two_corpora_would_defeat_the_holdout(shards, tmp_path: Path) -> None:
    """What is held out of one would be trained on as a part of the other."""
    for suffix in (".bin", ".idx"):
        (tmp_path / f"link{suffix}").symlink_to(f"{shards['code']}{suffix}")
        (tmp_path / f"copy{suffix}").write_bytes(Path(f"{shards['code']}{suffix}").read_bytes())
    for name in ("code", "copy"):
        checksum = file_checksum(f"{tmp_path / name}.bin")
        entry = ShardEntry(path=name, dtype="uint16", tokens=1000, documents=1, bin_xxh3_128=checksum)
        write_manifest(Manifest(vocab_size=30_000, shards=(entry,)), tmp_path / f"{name}.json")
    listed = str(tmp_path / "code.json")
    for first, again in (
        (shards["code"], shards["code"]),
        (shards["code"], f"{tmp_path}/../{tmp_path.name}/code"),
        (shards["code"], str(tmp_path / "link")),
        (shards["code"], listed),
        (listed, str(tmp_path / "link")),
        (listed, str(tmp_path / "copy.json")),
    ):
        entries = [
            {"name": "one", "paths": [shards["web"], first], "weight": 1},
            {"name": "two", "paths": [again, shards["math"]], "weight": 1},
        ]
        data = DataConfig.model_validate({"blend": entries, "sequence_length": LENGTH, "holdout_tokens": 200})
        with pytest.raises(DataError, match=r"this shard is given twice, also as .*data\.holdout_tokens would hold"):
            _training(data)
        # upsampling a part is fine where nothing is held out of it
        _training(data.model_copy(update={"holdout_tokens": 0}))
    within = DataConfig(
        train_paths=[shards["code"], shards["web"], str(tmp_path / "link")], sequence_length=LENGTH, holdout_tokens=200
    )
    with pytest.raises(DataError, match=r"link: this shard is given twice, also as .*code"):
        _training(within)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train_paths": ["x"]}, "train_paths and blend are both given"),
        ({"phases": [{"from_tokens": 9, "weights": {"wbe": 1}}]}, r"weighs \['wbe'\], blend has"),
        ({"phases": [{"from_tokens": 9, "weights": {"web": 0}}]}, "has no positive weight"),
        ({"phases": [{"from_tokens": n, "weights": {"web": 1}} for n in (9, 9)]}, r"\[9, 9\], expected ascending"),
        ({"validation_paths": ["x"], "holdout_tokens": 5}, "validation_paths and holdout_tokens 5 are both given"),
    ],
)
def test_contradictions_are_errors(shards, fields: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        _blend(shards, **fields)


def test_nothing_to_read_is_an_error() -> None:
    with pytest.raises(DataError, match=r"data\.train_paths and data\.blend are empty"):
        _training(DataConfig())
    with pytest.raises(DataError, match=r"data\.validation_paths is empty and data\.holdout_tokens is 0"):
        held_out_corpora(DataConfig(train_paths=["x"]), 1, 10, None)


def test_pairs_of_samples_share_a_window_and_epochs_take_twice_as_many(shards) -> None:
    """Complementary masks: the blend, its phases and the epochs are those of the windows."""
    data = _blend(shards, phases=[{"from_tokens": 100 * LENGTH, "weights": {"math": 1.0}}])
    halved = data.model_copy(update={"phases": [data.phases[0].model_copy(update={"from_tokens": 50 * LENGTH})]})
    pairs, single = training_corpus(data, 3, 30_000, None, (), 2), _training(halved)
    batch, other = np.empty((400, LENGTH), dtype=np.int64), np.empty((200, LENGTH), dtype=np.int64)
    pairs.read(range(400), batch)
    single.read(range(200), other)
    assert np.array_equal(batch, other.repeat(2, axis=0))
    assert pairs.origin(301) == single.origin(150)
    assert np.array_equal(pairs.document_starts(301), single.document_starts(150))
    assert pairs.epochs(300) == single.epochs(150)
    assert pairs.epochs(301) == single.epochs(151)
    one = training_corpus(DataConfig(train_paths=[shards["web"]], sequence_length=LENGTH), 3, 30_000, None, (), 2)
    one.read([6, 7, 8], batch[:3])
    assert np.array_equal(batch[0], batch[1])
    assert not np.array_equal(batch[1], batch[2])
