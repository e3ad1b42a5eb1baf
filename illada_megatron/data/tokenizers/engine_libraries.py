"""The libraries behind the tokenizer engines: each is opened here and brought to one form, flat numpy arrays.

Nothing here is trusted: engines.py compares ids with the reference's before and while it uses one of these."""

import hashlib
import itertools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from illada_megatron.data.errors import DataError
from illada_megatron.data.tokenizers.kept import Kept
from illada_megatron.data.tokenizers.tokenizer import MOST_IDS, SPACE_SIGN, Tokenizer

FlatIds = tuple[NDArray[np.int32], NDArray[np.int64]]
"""Token ids of all texts one after another [n], and how many each text has [texts]."""

OPENING_THREAD = "open tokenizer"
"""Name of the thread of `open_ahead`."""


class Library(NamedTuple):
    """A library opened on one tokenizer."""

    name: str
    encode: Callable[[list[str]], FlatIds]
    leaves_out: str | None = None
    """Texts with this character are not for it: they go to the reference."""


_begun: dict[tuple[str, bytes], Future[Library]] = {}
"""By name and content of the tokenizer's file."""
os.register_at_fork(after_in_child=_begun.clear)  # where the thread is not


class UnsuitableError(Exception):
    """The library cannot read this tokenizer; the message says why."""


def flatten(documents: Sequence[Sequence[int]]) -> FlatIds:
    """Lists of ids as flat arrays."""
    lengths = np.fromiter(map(len, documents), dtype=np.int64, count=len(documents))
    tokens = np.fromiter(itertools.chain.from_iterable(documents), dtype=np.int32, count=int(lengths.sum()))
    return tokens, lengths


def open_reference(tokenizer: Tokenizer) -> Library:
    return Library("reference", lambda texts: flatten(tokenizer.encode_batch(texts)))


def open_library(name: str, path: Path) -> Library:
    """Encodes on the thread that asks; threads may share one, and fill the cores better than a library's own do.

    Raises UnsuitableError: not installed, or this tokenizer is not for it."""
    if name not in ENGINE_NAMES:
        raise DataError(f"tokenizer engine is {name!r}, expected one of {', '.join(ENGINE_NAMES)}")
    if name not in _openers(path):
        raise UnsuitableError(f"does not serve {path.suffix} files")
    content = path.read_bytes()
    _set_threads()
    begun = _begun.pop((name, content), None)
    return _opened(name, path, content) if begun is None else begun.result()


def open_ahead(name: str, path: Path) -> None:
    """Begin to open, in a thread, what `open_library` will be asked for ("auto": the fastest): fastokens takes 0.2 s,
    most of it without Python's lock. What a library refuses, `open_library` raises. Raises OSError."""
    if name == "auto":
        name = next(iter(_openers(path)))
    if name not in _openers(path) or path.suffix not in (".json", ".model") or not path.is_file():
        return
    content = path.read_bytes()
    if (name, content) in _begun:
        return
    _set_threads()
    begun: Future[Library] = Future()

    def work() -> None:
        try:
            begun.set_result(_opened(name, path, content))
        except BaseException as error:  # open_library raises it
            begun.set_exception(error)

    # no daemon: one that comes back from Rust while the interpreter is being taken apart aborts the process
    thread = threading.Thread(target=work, name=OPENING_THREAD)
    with suppress(RuntimeError):  # no thread can be started: open_library does it
        thread.start()
        _begun.clear()  # what nobody has asked for
        _begun[name, content] = begun


def _set_threads() -> None:
    """Before another thread may look: the environment is nobody's to change then."""
    os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")


def _opened(name: str, path: Path, content: bytes) -> Library:
    try:
        return _openers(path)[name](content)
    except ImportError as error:
        raise UnsuitableError(f"not installed ({error}): pip install illada-megatron[fast]") from error
    except (UnsuitableError, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the libraries raise bare Exception, and a panic of Rust is a BaseException
        raise UnsuitableError(f"cannot read this tokenizer, it says: {error}") from error


def candidates(path: Path) -> list[str]:
    """Names of the engines that may serve the file, the fastest first (docs/log.md, 2026-11-25, has the figures)."""
    return list(_openers(path))


def _openers(path: Path) -> "dict[str, _Open]":
    return _FOR_MODEL if path.suffix == ".model" else _FOR_JSON


def library_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "of unknown version"


def added_names(path: Path) -> list[str]:
    """The names of the tokenizer's special and added tokens, which text may contain."""
    if path.suffix == ".json":
        return [token["content"] for token in _untrimmed(path.read_bytes()).get("added_tokens") or []]
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    # a model does not tell user-defined pieces from others through this interface: they are ordinary pieces to a text
    return [processor.id_to_piece(i) for i in range(processor.get_piece_size()) if processor.is_control(i)]


def _untrimmed(content: bytes) -> dict[str, Any]:
    """A tokenizer.json without its length limit and padding: they would change documents without a word."""
    definition: dict[str, Any] = orjson.loads(content)
    return {**definition, "truncation": None, "padding": None}


def _require_few_ids(definition: dict[str, Any]) -> None:
    """A library makes room for each id up to the largest, and ends the process where there is none."""
    vocab = definition["model"]["vocab"]
    added = [token["id"] for token in definition.get("added_tokens") or []]
    largest = max([*added, len(vocab), *(vocab.values() if isinstance(vocab, dict) else ())])
    if largest >= MOST_IDS:
        raise UnsuitableError(f"its largest id is {largest}, expected less than {MOST_IDS}")


def _open_fastokens(content: bytes) -> Library:
    import fastokens

    definition = _untrimmed(content)
    _require_few_ids(definition)
    tokenizer = fastokens.Tokenizer.from_json_str(orjson.dumps(definition).decode())

    def encode(texts: list[str]) -> FlatIds:
        # split_special_tokens: "</s>" in a text is four characters
        ids, offsets = tokenizer.encode_batch_flat(texts, add_special_tokens=False, split_special_tokens=True)
        return np.frombuffer(ids, dtype="<u4").view(np.int32), np.diff(np.frombuffer(offsets, dtype="<i8"))

    # for a regex it does not know it asks PCRE2, whose \s holds this character and Oniguruma's does not
    return Library("fastokens", encode, leaves_out="\u180e")


def _open_gigatoken_json(content: bytes) -> Library:
    definition = _untrimmed(content)
    _require_few_ids(definition)
    # gigatoken would find special tokens in the text, whatever one asks: it gets to know of none
    definition["added_tokens"] = [token for token in definition.get("added_tokens", []) if not token.get("special")]
    return _gigatoken(orjson.dumps(definition), leaves_out=None)


def _open_gigatoken_model(content: bytes) -> Library:
    decisive = [hashlib.sha256(text).hexdigest() for text in (content, Path(__file__).read_bytes())]
    kept = Kept("gigatoken_definitions", [*decisive, library_version("gigatoken"), library_version("sentencepiece")])
    definition = kept.get()
    if definition is None:  # half a second for 32,000 pieces
        definition = orjson.dumps(_definition_for_gigatoken(content))
        kept.put(definition)
    # a literal space sign is spelled in bytes by the reference; to gigatoken it is a space
    return _gigatoken(definition, leaves_out=SPACE_SIGN)


def _definition_for_gigatoken(content: bytes) -> dict[str, Any]:
    import sentencepiece
    from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

    processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    pieces = range(processor.get_piece_size())
    if any(map(processor.is_unused, pieces)):
        raise UnsuitableError("the model has unused pieces, which it would use")
    definition: dict[str, Any] = orjson.loads(sentencepiece_to_tokenizer_json(content))
    # SentencePiece makes no control, byte or unknown piece by merging: "<s>" in a text is three characters
    unmergeable = {
        processor.id_to_piece(piece)
        for piece in pieces
        if processor.is_control(piece) or processor.is_byte(piece) or processor.is_unknown(piece)
    }
    model = definition["model"]
    model["merges"] = [merge for merge in model["merges"] if unmergeable.isdisjoint((*merge, merge[0] + merge[1]))]
    definition["added_tokens"] = [token for token in definition["added_tokens"] if not token["special"]]
    return definition


def _gigatoken(definition: bytes, leaves_out: str | None) -> Library:
    import gigatoken

    tokenizer = gigatoken.Tokenizer.from_json(definition.decode())

    def encode(texts: list[str]) -> FlatIds:
        layout = tokenizer.encode_batch(texts, parallel=False).layout
        offsets = np.asarray(layout.offsets.data)
        tokens = np.asarray(layout.content.data)[offsets[0] : offsets[-1]]
        return tokens.view(np.int32), np.diff(offsets).astype(np.int64, copy=False)

    return Library("gigatoken", encode, leaves_out)


def _open_sentencepiece(content: bytes) -> Library:
    """The reference's own library without Python's lists of ids between."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=content)

    def encode(texts: list[str]) -> FlatIds:
        documents = processor.encode(texts, return_type="numpy", num_threads=1)
        lengths = np.fromiter(map(len, documents), dtype=np.int64, count=len(documents))
        return np.concatenate(documents) if documents else np.empty(0, np.int32), lengths

    return Library("sentencepiece", encode, leaves_out=SPACE_SIGN)


_Open = Callable[[bytes], Library]
_FOR_JSON: dict[str, _Open] = {
    "fastokens": _open_fastokens,
    "gigatoken": _open_gigatoken_json,
}
_FOR_MODEL: dict[str, _Open] = {
    "gigatoken": _open_gigatoken_model,
    "sentencepiece": _open_sentencepiece,
}
ENGINE_NAMES = ("auto", "reference", *dict.fromkeys((*_FOR_JSON, *_FOR_MODEL)))
