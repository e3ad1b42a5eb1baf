"""The corpora that a configuration describes: what training reads, what is held out of it, and what may not be."""

import re
from collections.abc import Collection, Sequence
from typing import Literal

from illada_megatron.config import RunConfig
from illada_megatron.config.schema import BlendEntry, DataConfig
from illada_megatron.data.corpus.blend import BlendSchedule
from illada_megatron.data.corpus.blended_corpus import BlendedCorpus
from illada_megatron.data.corpus.corpus import Corpus
from illada_megatron.data.errors import DataError
from illada_megatron.data.shards.shard_list import KnownShards, ShardList, list_shards
from illada_megatron.data.tokenizers.tokenizer import Tokenizer


def corpus_of_run(config: RunConfig, tokenizer: Tokenizer | None) -> BlendedCorpus:
    """The `training_corpus` of a run."""
    return training_corpus(
        config.data,
        config.training.seeds.data,
        config.model.vocab_size,
        tokenizer,
        config.checkpoint.allow_mismatch,
        config.diffusion.samples_per_window,
    )


def training_corpus(
    data: DataConfig,
    seed: int,
    vocab_size: int,
    tokenizer: Tokenizer | None,
    allow_mismatch: Collection[str] = (),
    samples_per_window: int = 1,
) -> BlendedCorpus:
    """What `data.train_paths` or `data.blend` names, without what is held out.

    allow_mismatch: `checkpoint.allow_mismatch`; with "tokenizer" in it, other tokenizers are warnings of the corpus.
    samples_per_window: see `BlendedCorpus`.

    Raises DataError: no shards, shards that cannot be used, that are validation shards as well, that two corpora have
    where tokens are held out of each, or that a manifest says were made by another tokenizer."""
    entries = _entries(data)
    listed = [list_shards(entry.paths) for entry in entries]
    validation = list_shards(data.validation_paths) if data.validation_paths else None
    warnings = _check_tokenizers(
        [*listed, *([validation] if validation else [])], vocab_size, tokenizer, allow_mismatch
    )
    if validation:
        _require_unseen(validation, listed)
    if data.holdout_tokens:
        _require_once(listed)
    return _blend(data, entries, listed, seed, vocab_size, warnings, samples_per_window)


def held_out_corpora(
    data: DataConfig, seed: int, vocab_size: int, tokenizer: Tokenizer | None, allow_mismatch: Collection[str] = ()
) -> list[Corpus]:
    """Held-out windows in stream order, each corpus with a name: of each of `data.validation_paths` (named after its
    file), or what `data.holdout_tokens` holds out of each training corpus. Raises DataError when neither is set, and as
    `training_corpus`."""
    if data.validation_paths:
        names, parts = held_out_names(data.validation_paths), [[path] for path in data.validation_paths]
    elif data.holdout_tokens:
        entries = _entries(data)
        names, parts = [entry.name for entry in entries], [entry.paths for entry in entries]
    else:
        raise DataError(
            "validation was asked for, but data.validation_paths is empty and data.holdout_tokens is 0: name held-out "
            "shards, or hold tokens out of each training corpus"
        )
    listed = [list_shards(paths) for paths in parts]
    _check_tokenizers(listed, vocab_size, tokenizer, allow_mismatch)
    return [_corpus(data, one, name, seed, vocab_size, "validation") for name, one in zip(names, listed, strict=True)]


def check_unseen(data: DataConfig) -> list[str]:
    """Raises DataError where one of `data.validation_paths` is a shard to train on. Returns what there is to be said:
    training shards that are not there cannot be compared."""
    if not data.train_paths and not data.blend:
        return []
    try:
        training = [list_shards(entry.paths) for entry in _entries(data)]
    except (DataError, OSError) as error:
        return [f"warning: whether the held-out text was trained on was not looked at: {error}"]
    _require_unseen(list_shards(data.validation_paths), training)
    return []


def held_out_names(paths: Sequence[str]) -> list[str]:
    """What each of `data.validation_paths` is called in figures: its last part without the manifest's suffix and
    without what no name has (`*`); where two are alike, with as many folders before it as tell them apart."""
    parts = [[part for part in re.split(r"[^A-Za-z0-9_.-]+", _stem(path)) if part.strip("_.-")] for path in paths]
    names = [""] * len(parts)
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part.strip("_.-") for part in one[-depth:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name or 'text'}-{number}" for number, name in enumerate(names, start=1)]


def _stem(path: str) -> str:
    return path.removesuffix(".json").removesuffix(".manifest")


def epoch_problems(corpus: BlendedCorpus, data: DataConfig, num_samples: int) -> list[str]:
    """What `num_samples` samples would read more often than its max_epochs."""
    epochs = corpus.epochs(num_samples)
    return [
        f"{entry.name or 'data.train_paths'} would be read {epochs[entry.name]:.2f} times by sample {num_samples}, "
        f"max_epochs is {entry.max_epochs:g}"
        for entry in _entries(data)
        if entry.max_epochs is not None and epochs[entry.name] > entry.max_epochs
    ]


def _entries(data: DataConfig) -> list[BlendEntry]:
    if data.blend:
        return data.blend
    if not data.train_paths:
        raise DataError(
            "data.train_paths and data.blend are empty: name the manifest or the .bin/.idx prefixes to train on "
            "(illada preprocess writes them)"
        )
    return [BlendEntry.model_construct(name="", paths=data.train_paths, weight=1.0, max_epochs=data.max_epochs)]


def _blend(
    data: DataConfig,
    entries: Sequence[BlendEntry],
    listed: Sequence[ShardList],
    seed: int,
    vocab_size: int,
    warnings: Sequence[str],
    samples_per_window: int = 1,
) -> BlendedCorpus:
    corpora = [
        _corpus(data, one, entry.name, seed, vocab_size, "training") for entry, one in zip(entries, listed, strict=True)
    ]
    phases = [(0, [entry.weight for entry in entries])]
    for phase in data.phases:
        first_sample = -(-phase.from_tokens // (data.sequence_length * samples_per_window))
        phases.append((first_sample, [phase.weights.get(entry.name, 0.0) for entry in entries]))
    return BlendedCorpus(corpora, BlendSchedule(phases), warnings, samples_per_window)


def _corpus(
    data: DataConfig,
    listed: ShardList,
    name: str,
    seed: int,
    vocab_size: int,
    part: Literal["training", "validation"],
) -> Corpus:
    return Corpus(
        listed,
        data.sequence_length,
        seed,
        shuffle=data.shuffle and part == "training",
        vocab_size=vocab_size,
        name=name,
        holdout_tokens=data.holdout_tokens,
        part=part,
    )


def _check_tokenizers(
    listed: Sequence[ShardList], vocab_size: int, tokenizer: Tokenizer | None, allow_mismatch: Collection[str]
) -> list[str]:
    """Ids of different tokenizers mean different text: trained on together, or validated on, they would be noise that
    nothing notices. Known is what manifests say. Returns what differs and is allowed."""
    warnings = []
    expected = (
        None if tokenizer is None else (f"data.tokenizer_path is {tokenizer.fingerprint[:16]}…", tokenizer.fingerprint)
    )
    for path, facts in ((path, facts) for one in listed for path, facts in one.tokenizers.items()):
        if facts.vocab_size > vocab_size:
            raise DataError(
                f"{path}: was written with a vocabulary of {facts.vocab_size}, model.vocab_size is {vocab_size}: "
                "raise model.vocab_size, or preprocess the text with the model's tokenizer"
            )
        if facts.sha256 is None:
            continue
        if expected is None:
            expected = f"{path} with that of {facts.sha256[:16]}…", facts.sha256
        if facts.sha256 == expected[1]:
            continue
        difference = f"{path}: was written with the tokenizer of SHA-256 {facts.sha256[:16]}…, {expected[0]}"
        if "tokenizer" not in allow_mismatch:
            raise DataError(
                f"{difference}: give shards of one tokenizer only, and name that in data.tokenizer_path; if the file "
                "is the same tokenizer, saved again with the same ids, correct tokenizer_sha256 in the manifest "
                f'({expected[1]}), or set checkpoint.allow_mismatch=["tokenizer"]'
            )
        warnings.append(difference)
    return warnings


def _require_unseen(validation: ShardList, training: Sequence[ShardList]) -> None:
    """Held-out figures of trained text would look splendid."""
    known = KnownShards(shard for one in training for shard in one.shards)
    for shard in validation.shards:
        if (same := known.find(shard)) is not None:
            raise DataError(
                f"{shard.prefix}: this validation shard is the training shard {same.prefix}, or has the same tokens: "
                "give other shards in data.validation_paths, or leave it empty and set data.holdout_tokens"
            )


def _require_once(training: Sequence[ShardList]) -> None:
    """What is held out of one corpus must not be trained on as part of another."""
    known = KnownShards()
    for shard in (shard for one in training for shard in one.shards):
        if (same := known.find(shard)) is not None:
            raise DataError(
                f"{shard.prefix}: this shard is given twice, also as {same.prefix} (or with the same tokens), and "
                "data.holdout_tokens would hold tokens out of one and train on them in the other: name it once, or "
                "set data.holdout_tokens=0 and give other shards in data.validation_paths"
            )
        known.add(shard)
