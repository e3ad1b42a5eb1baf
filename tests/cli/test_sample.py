"""`illada sample`: the text, origin and noise of the very sample that training takes."""

import json
import re
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from launch import Illada

from illada_megatron.config import RunConfig, load_config
from illada_megatron.data.corpus.configured import training_corpus
from illada_megatron.data.preprocessing.train_tokenizer import train_sentencepiece
from illada_megatron.data.shards.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from illada_megatron.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from illada_megatron.diffusion import make_masked_batch


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    corpus = directory / "corpus.jsonl"
    sources = sorted(Path(sysconfig.get_path("stdlib"), "json").glob("*.py"))
    corpus.write_text("".join(json.dumps({"text": source.read_text()}) + "\n" for source in sources))
    return train_sentencepiece([corpus], directory / "t.model", vocab_size=400)


@pytest.fixture(scope="module")
def blend(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Two corpora of small shards in a blend that changes after 40 samples; some documents are empty."""
    directory, words = tmp_path_factory.mktemp("blend"), load_tokenizer(tokenizer)
    for name in ("json", "email"):
        text = "".join(path.read_text() for path in sorted(Path(sysconfig.get_path("stdlib"), name).glob("*.py")))
        tokens = np.array(words.encode(text[:40_000]))
        for shard, begin in enumerate(range(0, len(tokens), 700)):
            part = tokens[begin : begin + 700]
            with IndexedDatasetWriter(directory / f"{name}_{shard:03}", words.vocab_size) as writer:
                for document in np.split(part, [min(len(part), cut) for cut in (150, 150, 400)]):
                    writer.add(document, np.array([len(document)]))
    entries = ",".join(
        f"{{name: {name}, paths: ['{directory / name}_*'], weight: {weight}}}"
        for name, weight in (("json", 1.0), ("email", 2.0))
    )
    return (
        *(f"data.blend=[{entries}]", "data.phases=[{from_tokens: 2560, weights: {json: 1.0}}]"),
        *(f"data.tokenizer_path={tokenizer}", f"model.vocab_size={words.vocab_size}"),
        *(f"model.mask_token_id={words.mask_id}", "data.sequence_length=64", "model.max_sequence_length=64"),
    )


def _expected(config: RunConfig, index: int, words: Tokenizer) -> tuple[str, int, float]:
    """(clean text, masked tokens, t) of what a training step would be handed."""
    corpus = training_corpus(config.data, config.training.seed, config.model.vocab_size, words)
    batch = make_masked_batch(corpus, [index], config.diffusion, config.model.mask_token_id, config.training.seed)
    clean = words.decode(batch.labels[0].tolist(), skip_special_tokens=False)
    return clean, int((batch.tokens == config.model.mask_token_id).sum()), float(batch.t)


def test_prints_what_training_reads(blend: tuple[str, ...], tokenizer: Path, illada: Illada) -> None:
    """Phase, blend, order, noise: the sample of the other index, corpus or seed would have another text."""
    words, config = load_tokenizer(tokenizer), load_config("tiny", blend)
    texts = set()
    for index in (0, 7, 39, 40, 5000):
        outcome = illada("sample", index, "--config", "tiny", *blend)
        assert outcome.code == 0, outcome.err
        clean, masked, t = _expected(config, index, words)
        head, shown = outcome.out.split("clean:\n")
        text, noisy = shown.split("\nmasked:\n")
        assert text == clean
        texts.add(text)
        assert f"t {t:.4f}, p " in head
        assert f"; {masked} of 64 tokens masked" in head
        assert sum(map(int, re.findall(r"<mask:(\d+)>", noisy))) == masked
        assert ("corpus json" in head) or index < 40
    assert len(texts) == 5


def test_names_shards_offsets_and_documents(blend: tuple[str, ...], tokenizer: Path, illada: Illada) -> None:
    """What it names can be looked up: the tokens of those shards at those offsets, inside those documents, are the
    sample's, also where it runs across documents and shards."""
    words, config = load_tokenizer(tokenizer), load_config("tiny", blend)
    outcome = illada("sample", *range(60), "--config", "tiny", *blend)
    heads = re.findall(r"sample (\d+): corpus (\w+), .*\n((?:  /.*\n)+)", outcome.out)
    assert [int(index) for index, _, _ in heads] == list(range(60))
    corpus = training_corpus(config.data, config.training.seed, config.model.vocab_size, words)
    several = 0
    for index, name, lines in heads:
        found = []
        pieces = re.findall(r"  (\S+): tokens (\d+) to (\d+), documents? (\d+)(?: to (\d+))?", lines)
        for prefix, first, last, begin, end in pieces:
            dataset = IndexedDataset(prefix)
            assert f"/{name}" in prefix
            found += dataset.read(int(first), int(last) - int(first) + 1).tolist()
            bounds = np.cumsum([0, *dataset.document_lengths(0, dataset.num_documents)])
            assert bounds[int(begin)] <= int(first) < bounds[int(begin) + 1]
            last_document = int(end or begin)
            assert bounds[last_document] <= int(last) < bounds[last_document + 1]
        several += len(pieces) > 1
        assert found == corpus[int(index)].tolist()
    assert several  # some run across shards


def test_ids_without_a_tokenizer_and_from_a_checkpoint(two_steps: Path, illada: Illada) -> None:
    config = load_config(json.loads((two_steps / "step_00000002" / "checkpoint.json").read_text())["config"])
    corpus = training_corpus(config.data, config.training.seed, config.model.vocab_size, None)
    outcome = illada("sample", 11, "--checkpoint", two_steps)
    assert outcome.code == 0, outcome.err
    assert f"clean:\n{' '.join(map(str, corpus[11].tolist()))}\nmasked:\n" in outcome.out
    other = illada("sample", 11, "--checkpoint", two_steps, "training.seed=5")
    assert other.out != outcome.out


def test_pairs_segments_and_seeds(blend: tuple[str, ...], tokenizer: Path, illada: Illada) -> None:
    """Two samples of one window, complements of each other; each seed changes its own draws alone."""

    def shown(index: int, *overrides: str) -> tuple[str, str, str]:
        outcome = illada("sample", index, "--config", "tiny", *blend, *overrides)
        assert outcome.code == 0, outcome.err
        head, texts = outcome.out.split("clean:\n")
        clean, noisy = texts.split("\nmasked:\n")
        return head, clean, noisy

    pairs = "diffusion.complementary_masks=true"
    first, second = shown(8, pairs, "diffusion.eps=0.0"), shown(9, pairs, "diffusion.eps=0.0")
    assert first[1] == second[1] == shown(4)[1]
    masked = [sum(map(int, re.findall(r"<mask:(\d+)>", noisy))) for _, _, noisy in (first, second)]
    assert sum(masked) == 64
    assert "the window of sample 9 too" in first[0]
    own = shown(7, "diffusion.t_per=segment", "diffusion.split_probability=1.0")
    times, lengths = re.search(r"  t (.*), p (.*); \d+ of", own[0]), re.search(r"segments of (.*) tokens", own[0])
    assert times
    assert lengths
    assert len(times[1].split(", ")) == len(times[2].split(", ")) == len(lengths[1].split(" + ")) == 2
    plain, noise, order = shown(7), shown(7, "training.noise_seed=5"), shown(7, "training.data_seed=5")
    assert plain == shown(7, "training.init_seed=5")
    assert noise[1] == plain[1]
    assert noise[2] != plain[2]
    assert order[1] != plain[1]
    assert re.findall(r"  t \S+ p \S+", order[0]) == re.findall(r"  t \S+ p \S+", plain[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x=1", "--config", "tiny"], "no sample index was given"),
        (["3.5", "--config", "tiny"], "'3.5' is neither a sample index"),
        (["3"], "give one of --config and --checkpoint"),
        (["3", "--config", "tiny"], "data.train_paths and data.blend are empty"),
        (["3", "--config", "tiny", "data.tokenizer_path=nowhere.model"], "nowhere.model: no such file"),
    ],
)
def test_refuses(arguments: list[str], message: str, illada: Illada) -> None:
    outcome = illada("sample", *arguments)
    assert outcome.code == 2
    assert message in outcome.err
