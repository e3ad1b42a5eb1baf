"""`--prepend-bos`: each document begins with BOS once, whichever library tokenizes, and a job knows which it was."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from launch import Illada

from illada_megatron.data.errors import DataError
from illada_megatron.data.preprocessing.plan import fingerprinted
from illada_megatron.data.preprocessing.produce_corpus import PreprocessOptions, plan_job, preprocess
from illada_megatron.data.shards.indexed_dataset import IndexedDataset
from illada_megatron.data.tokenizers.engine_libraries import candidates
from illada_megatron.data.tokenizers.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def documents(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Long and short ones, in several batches."""
    path = tmp_path_factory.mktemp("documents") / "in.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts[:20], "a", " ", *texts[20:40]]))
    return path


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
@pytest.mark.parametrize("append_eod", [True, False])
def test_every_engine_begins_documents_with_bos(
    kind: str, append_eod: bool, request: pytest.FixtureRequest, documents: Path, tmp_path: Path
) -> None:
    path = request.getfixturevalue(f"{kind}_path")
    bos, agreed = load_tokenizer(path).bos_id, 0
    assert bos is not None
    preprocess([documents], tmp_path / "plain", path, PreprocessOptions(append_eod=append_eod))
    plain = IndexedDataset(tmp_path / "plain")
    for engine in ("reference", *candidates(path)):
        options = PreprocessOptions(append_eod=append_eod, prepend_bos=True, tokenizer_engine=engine)
        try:
            counts = preprocess([documents], tmp_path / engine, path, options).counts
        except DataError:  # it has other ids than the reference for this tokenizer
            continue
        agreed += 1
        dataset = IndexedDataset(tmp_path / engine)
        assert counts.tokens == plain.num_tokens + plain.num_documents
        assert dataset.num_documents == plain.num_documents
        for number in range(plain.num_documents):
            assert dataset.document(number).tolist() == [bos, *plain.document(number).tolist()], (engine, number)
    assert agreed > 1
    shuffled = PreprocessOptions(append_eod=append_eod, prepend_bos=True, shuffle_seed=1, workers=2, shard_mb=0.1)
    preprocess([documents], tmp_path / "shuffled", path, shuffled)
    for shard in tmp_path.glob("shuffled_*.bin"):
        dataset = IndexedDataset(shard.with_suffix(""))
        assert {int(dataset.document(number)[0]) for number in range(dataset.num_documents)} == {bos}


def test_a_conversation_has_one(sentencepiece_path: Path, tmp_path: Path) -> None:
    """Templates that write BOS themselves get no second one."""
    words = load_tokenizer(sentencepiece_path)
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "one two"}]}) + "\n")
    found = []
    for name, begin in (("with", "{{ bos_token }}"), ("without", "")):
        template = tmp_path / f"{name}.jinja"
        template.write_text(begin + "{% for m in messages %}{{ m.content }}{% endfor %}")
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
        options = PreprocessOptions(chat=True, chat_template=template, prepend_bos=True)
        preprocess([path], tmp_path / name, sentencepiece_path, options)
        found.append(IndexedDataset(tmp_path / name).document(0).tolist())
    assert all(tokens.count(words.bos_id) == 1 and tokens[0] == words.bos_id for tokens in found)


def test_a_job_notices_the_change_and_an_older_one_goes_on(
    documents: Path, sentencepiece_path: Path, tmp_path: Path, illada: Illada
) -> None:
    """Half of a corpus with BOS and half without would be found by nobody."""
    command = ("preprocess", documents, "--output-prefix", tmp_path / "out", "--tokenizer", sentencepiece_path)
    assert illada(*command).code == 0
    assert "nothing done" in illada(*command).out
    other = illada(*command, "--prepend-bos")
    assert other.code != 0
    assert "prepend_bos was False, now True" in other.err
    assert illada(*command, "--prepend-bos", "--overwrite").code == 0
    back = illada(*command)
    assert back.code != 0
    assert "prepend_bos was True, now False" in back.err
    # as it was before the option was there
    job, _, _ = plan_job([documents], tmp_path / "x", sentencepiece_path, PreprocessOptions())
    record = job.model_dump(mode="json")
    del record["prepend_bos"]
    assert fingerprinted(type(job).model_validate(record), []) == fingerprinted(job, [])
    named = job.model_copy(update={"prepend_bos": True})
    assert fingerprinted(named, []).fingerprint != fingerprinted(job, []).fingerprint


def test_a_tokenizer_without_bos_is_an_error(texts: list[str], documents: Path, tmp_path: Path) -> None:
    plain = tokenizers.Tokenizer(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=200, special_tokens=["</s>"], show_progress=False)
    plain.train_from_iterator(texts[:3], trainer)
    plain.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"no token for a beginning .*leave --prepend-bos out"):
        preprocess([documents], tmp_path / "out", tmp_path / "tokenizer.json", PreprocessOptions(prepend_bos=True))


def test_documents_of_no_token_begin_too() -> None:
    """What np.insert does at equal places is what is wanted: a BOS for each of them, in their order."""
    lengths = np.array([0, 2, 0, 1])
    starts = np.cumsum(lengths) - lengths
    assert np.insert(np.array([7, 8, 9]), starts, 1).tolist() == [1, 1, 7, 8, 1, 1, 9]
