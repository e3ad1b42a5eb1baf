"""The fastest tokenizer engine that gives the reference's ids.

The reference is `load_tokenizer(path).encode_batch`. Faster libraries differ from it in corners, so none is trusted:
one is used only after it gave the reference's ids on texts made to tell them apart and on the user's own, and while it
runs a small share of the documents is encoded by both. A difference ends the run: ids are right or there are none."""

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from illada_megatron.data.errors import DataError
from illada_megatron.data.tokenizers.engine_libraries import (
    ENGINE_NAMES,
    FlatIds,
    Library,
    UnsuitableError,
    added_names,
    candidates,
    library_version,
    open_library,
    open_reference,
)
from illada_megatron.data.tokenizers.engine_probes import boundary_texts, probe_texts, write_boundary_tokenizer
from illada_megatron.data.tokenizers.engine_verdicts import Verdict, Verdicts
from illada_megatron.data.tokenizers.long_texts import LongTexts
from illada_megatron.data.tokenizers.tokenizer import Tokenizer, load_tokenizer

__all__ = ["AUDITED_SHARE", "ENGINE_NAMES", "Engine", "choose_engine", "open_engine"]

AUDITED_SHARE = 1 / 4000
"""Of the documents, and so of the text, chosen by a hash of the text: the same documents in every run."""

# of a long text: about as much as another batch has
_PIECES_AT_A_TIME = 16
_SHOWN_CHARACTERS = 30
_DIGESTED_CHARACTERS = 500


class OtherIdsError(DataError):
    """A library does not give the reference's ids."""


class Engine(Protocol):
    """Text to ids, many documents a call. Threads may share one."""

    name: str
    """"fastokens", "gigatoken", "sentencepiece" or "reference"."""
    report: Sequence[str]
    """For the user, a line each: what was chosen, what was refused and why."""

    def encode(self, texts: list[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Ids of all texts one after another [n] and how many each text has [texts]. No BOS, no EOS is added.

        Where one of `texts` is long, the list is empty afterwards: they are let go of as they are cut into pieces.
        Raises DataError when the audit finds other ids than the reference's."""


def choose_engine(
    tokenizer_path: str | Path,
    name: str = "auto",
    sample_texts: Sequence[str] | None = None,
) -> Engine:
    """The engine to encode with, compared with the reference first.

    name: "auto", the fastest that agrees; "reference"; or one of ENGINE_NAMES.
    sample_texts: the first few MB of the corpus, compared in addition to the built-in texts.

    Threads that a library has started for it do not survive a fork.
    Raises DataError: unusable tokenizer, unknown name, or an engine asked for by name that cannot serve or differs."""
    path = Path(tokenizer_path)
    if name not in ENGINE_NAMES:
        raise DataError(f"tokenizer engine is {name!r}, expected one of {', '.join(ENGINE_NAMES)}")
    tokenizer = load_tokenizer(path)
    if name == "reference":
        return CheckedEngine(None, tokenizer, ["tokenizer engine reference: asked for"])
    sample = list(sample_texts or [])
    expected_of_sample = open_reference(tokenizer).encode(sample)
    refused: list[str] = []
    with tempfile.TemporaryDirectory() as directory:
        built_in = _BuiltInTexts(path, tokenizer, Path(directory))
        for candidate in candidates(path) if name == "auto" else [name]:
            try:
                engine = CheckedEngine(open_library(candidate, path), tokenizer)
                verdict = built_in.verdict(engine)
                engine.compare(sample, expected_of_sample)
            except (UnsuitableError, DataError) as error:
                refused.append(f"tokenizer engine {candidate} refused: {error}")
                continue
            engine.report = [*refused, _chosen(candidate, verdict, sample)]
            return engine
    if name != "auto":
        raise DataError(f"{path}: {refused[0]}. Choose another engine: auto, or reference, which always serves")
    return CheckedEngine(None, tokenizer, [*refused, "tokenizer engine reference: no other serves"])


def open_engine(tokenizer_path: str | Path, name: str) -> Engine:
    """The engine `name` without comparing it: where choose_engine has done that, or is about to.

    The audit goes on. Raises DataError when it cannot be opened here."""
    path = Path(tokenizer_path)
    tokenizer = load_tokenizer(path)
    if name == "reference":
        return CheckedEngine(None, tokenizer)
    try:
        return CheckedEngine(open_library(name, path), tokenizer)
    except UnsuitableError as error:
        raise DataError(f"{path}: tokenizer engine {name} {error}") from error


def _chosen(name: str, verdict: Verdict, sample: Sequence[str]) -> str:
    texts, characters = verdict.texts + len(sample), verdict.characters + sum(map(len, sample))
    return (
        f"tokenizer engine {name} {library_version(name)}: the reference's ids on {texts} texts of "
        f"{characters / 1e6:.1f} million characters; one document in {1 / AUDITED_SHARE:.0f} is encoded by both"
    )


class _BuiltInTexts:
    """Whether libraries give the reference's ids on the texts made to tell them apart, or did so before."""

    def __init__(self, path: Path, tokenizer: Tokenizer, directory: Path) -> None:
        self._path, self._tokenizer = path, tokenizer
        self._verdicts = Verdicts(tokenizer.fingerprint)
        self._boundaries = directory / "boundaries.json"

    def verdict(self, engine: "CheckedEngine") -> Verdict:
        """Raises DataError where it does not."""
        verdict = self._verdicts.get(engine.name)
        if verdict is None:
            verdict = self._compared(engine)
            self._verdicts.put(engine.name, verdict)
        if verdict.refused is not None:
            raise DataError(verdict.refused)
        return verdict

    def _compared(self, engine: "CheckedEngine") -> Verdict:
        texts, expected = self._probes
        refused = None
        try:
            engine.compare(texts, expected)
            if self._has_boundaries:
                others, tokenizer, others_expected = self._boundary_probes
                library = open_library(engine.name, self._boundaries)
                CheckedEngine(library, tokenizer).compare(others, others_expected)
        except OtherIdsError as error:  # what else may happen, may not happen again
            refused = str(error)
        return Verdict(refused=refused, texts=len(texts), characters=sum(map(len, texts)))

    @functools.cached_property
    def _probes(self) -> tuple[list[str], FlatIds]:
        texts = probe_texts(self._tokenizer, added_names(self._path))
        return texts, open_reference(self._tokenizer).encode(texts)

    @functools.cached_property
    def _has_boundaries(self) -> bool:
        """Whether libraries can be asked how they cut text into words: see write_boundary_tokenizer."""
        return self._path.suffix == ".json" and write_boundary_tokenizer(self._path, self._boundaries)

    @functools.cached_property
    def _boundary_probes(self) -> tuple[list[str], Tokenizer, FlatIds]:
        """Takes about a second: only when a library passed everything else."""
        texts, tokenizer = boundary_texts(), load_tokenizer(self._boundaries)
        return texts, tokenizer, open_reference(tokenizer).encode(texts)


class CheckedEngine:
    """A library with the reference beside it."""

    def __init__(self, library: Library | None, tokenizer: Tokenizer, report: Sequence[str] = ()) -> None:
        """library: None for the reference itself."""
        self._reference = open_reference(tokenizer)
        self._library = library or self._reference
        self._long_texts = LongTexts(tokenizer)
        self.name = self._library.name
        self.report: Sequence[str] = report

    def encode(self, texts: list[str]) -> FlatIds:
        if not any(map(LongTexts.is_long, texts)):
            return self._audited(texts)
        texts.reverse()
        parts = []
        while texts:
            parts.append(self._encode_by_pieces(texts.pop()))
        return np.concatenate(parts) if len(parts) > 1 else parts[0], np.array([len(part) for part in parts])

    def _encode_by_pieces(self, text: str) -> NDArray[np.int32]:
        pieces = list(self._long_texts.pieces(text))
        del text  # one rare character has made it four times as large as most of its pieces are
        pieces.reverse()
        parts = []
        while pieces:
            parts.append(self._audited([pieces.pop() for _ in pieces[-_PIECES_AT_A_TIME:]])[0])
        return np.concatenate(parts)

    def _audited(self, texts: list[str]) -> FlatIds:
        tokens, lengths = self._encode(texts)
        if self._library is not self._reference:
            self._audit(texts, tokens, lengths)
        return tokens, lengths

    def compare(self, texts: list[str], expected: FlatIds) -> None:
        """Raises OtherIdsError, with the place, unless these texts get the `expected` ids; DataError where it fails."""
        difference = _first_difference(self._encode(texts), expected)
        if difference is not None:
            text, place = difference
            raise OtherIdsError(
                f"it gave other ids than the reference for {_shown(texts[text])} from its token {place} on"
            )

    def _encode(self, texts: list[str]) -> FlatIds:
        sign = self._library.leaves_out
        left_out = [i for i, text in enumerate(texts) if sign in text] if sign is not None else []
        if not left_out:
            return self._guarded(texts)
        rest = sorted(set(range(len(texts))) - set(left_out))
        by_text: list[NDArray[np.int32]] = [np.empty(0, np.int32)] * len(texts)
        for places, encode in ((left_out, self._reference.encode), (rest, self._guarded)):
            tokens, lengths = encode([texts[i] for i in places])
            for i, ids in zip(places, np.split(tokens, np.cumsum(lengths)[:-1]), strict=False):
                by_text[i] = ids
        return np.concatenate(by_text), np.fromiter(map(len, by_text), np.int64, len(by_text))

    def _guarded(self, texts: list[str]) -> FlatIds:
        """The library's answer, of the right form."""
        try:
            tokens, lengths = self._library.encode(texts)
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # a panic of Rust is a BaseException
            raise DataError(
                f"tokenizer engine {self.name} failed: {error}: run again with --tokenizer-engine reference"
            ) from error
        if len(lengths) != len(texts) or int(lengths.sum()) != len(tokens):
            raise DataError(
                f"tokenizer engine {self.name} gave {len(lengths)} documents and {len(tokens)} tokens, expected "
                f"{len(texts)} and {int(lengths.sum())}: run again with --tokenizer-engine reference"
            )
        return tokens, lengths

    def _audit(self, texts: list[str], tokens: NDArray[np.int32], lengths: NDArray[np.int64]) -> None:
        """Encode the chosen ones of `texts` again, with the reference."""
        limit = int(AUDITED_SHARE * 2**64)
        chosen = [i for i, text in enumerate(texts) if _digest(text) < limit]
        if not chosen:
            return
        ends = np.cumsum(lengths)
        expected, expected_lengths = self._reference.encode([texts[i] for i in chosen])
        start = 0
        for i, length in zip(chosen, expected_lengths.tolist(), strict=True):
            if not np.array_equal(tokens[ends[i] - lengths[i] : ends[i]], expected[start : start + length]):
                raise DataError(
                    f"tokenizer engine {self.name} gave other ids than the reference for the document that begins "
                    f"{_shown(texts[i])}: run again with --tokenizer-engine reference"
                )
            start += length


def _digest(text: str) -> int:
    """64 bits of it; of a long one both ends."""
    if len(text) > 2 * _DIGESTED_CHARACTERS:
        text = text[:_DIGESTED_CHARACTERS] + text[-_DIGESTED_CHARACTERS:]
    return xxhash.xxh3_64_intdigest(text.encode())


def _first_difference(found: FlatIds, expected: FlatIds) -> tuple[int, int] | None:
    """(text, token in the text) where the two first differ."""
    (tokens, lengths), (expected_tokens, expected_lengths) = found, expected
    if np.array_equal(tokens, expected_tokens) and np.array_equal(lengths, expected_lengths):
        return None
    start, expected_start = 0, 0
    for text, (length, expected_length) in enumerate(zip(lengths.tolist(), expected_lengths.tolist(), strict=True)):
        ids = tokens[start : start + length]
        expected_ids = expected_tokens[expected_start : expected_start + expected_length]
        if not np.array_equal(ids, expected_ids):
            common = min(length, expected_length)
            unequal = np.flatnonzero(ids[:common] != expected_ids[:common])
            return text, int(unequal[0]) if len(unequal) else common
        start, expected_start = start + length, expected_start + expected_length
    raise AssertionError("flat ids differ, but no text's do")


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "...")
