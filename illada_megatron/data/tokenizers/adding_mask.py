"""A tokenizer with a mask token, made of one that has none: behind its last id, so that all others stay."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from illada_megatron.data.errors import DataError
from illada_megatron.data.tokenizers.engine_probes import probe_texts
from illada_megatron.data.tokenizers.finding import BESIDE, find_tokenizer
from illada_megatron.data.tokenizers.tokenizer import MASK_NAMES, Tokenizer, load_tokenizer, parsed_tokenizer
from illada_megatron.system.whole_file import replaced

DEFAULT_NAME = "<|mask|>"


@dataclass(frozen=True)
class WithMask:
    """What was made."""

    path: Path
    """Of the new tokenizer's file."""
    mask_token_id: int
    vocab_size_before: int
    vocab_size: int


def add_mask(name: str | Path, output: Path, mask: str = DEFAULT_NAME) -> WithMask:
    """Write the tokenizer `name` (as `find_tokenizer` takes it) with a mask token to `output`: a file that ends as the
    tokenizer's does, or a directory, which also gets the chat template and settings beside it.

    mask: one of MASK_NAMES, by which it is found again. Whatever text is encoded has the same ids as before, which is
    tried on hard texts before anything is written. Raises DataError, OSError."""
    if mask not in MASK_NAMES:
        raise DataError(f"--mask is {mask!r}, expected a name by which a mask is found: {', '.join(MASK_NAMES)}")
    path = find_tokenizer(name, "PATH")
    before = load_tokenizer(path)
    if before.mask_id is not None:
        raise DataError(
            f"{path}: has a mask already, {before.piece(before.mask_id)!r} of id {before.mask_id}: use it as it is"
        )
    target = output if output.suffix in (".model", ".json") else output / path.name
    if target.suffix != path.suffix:
        raise DataError(
            f"--output is {output}, expected a directory or a name that ends in {path.suffix}, as {path} does"
        )
    content, mask_token_id = path.read_bytes(), before.vocab_size
    made = (_to_sentencepiece if path.suffix == ".model" else _to_json)(content, path, mask, mask_token_id)
    beside = {} if target is output else _beside(path, mask)
    for file in (target, *(target.with_name(other) for other in beside)):
        if file.exists():
            raise DataError(f"{file}: exists, and is not replaced: give another --output")
    _compare(before, parsed_tokenizer(target, made), path, mask, mask_token_id)
    target.parent.mkdir(parents=True, exist_ok=True)
    for file, text in {**{target.with_name(other): text for other, text in beside.items()}, target: made}.items():
        with replaced(file) as stream:
            stream.write(text)
    return WithMask(target, mask_token_id, before.vocab_size, mask_token_id + 1)


def _to_json(content: bytes, path: Path, mask: str, mask_token_id: int) -> bytes:
    """One entry more, nothing else changed."""
    definition: dict[str, Any] = orjson.loads(content)
    added = definition.get("added_tokens") or []
    if any(token["content"] == mask for token in added) or mask in definition["model"].get("vocab", ()):
        raise _taken(path, mask)
    entry = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    definition["added_tokens"] = [*added, {"id": mask_token_id, "content": mask, **entry, "special": True}]
    return orjson.dumps(definition, option=orjson.OPT_INDENT_2) + b"\n"


def _to_sentencepiece(content: bytes, path: Path, mask: str, mask_token_id: int) -> bytes:
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(content)
    if any(piece.piece == mask for piece in model.pieces):
        raise _taken(path, mask)
    piece = model.pieces.add()
    piece.piece, piece.score, piece.type = mask, 0.0, sentencepiece_model_pb2.ModelProto.SentencePiece.CONTROL
    model.trainer_spec.vocab_size = mask_token_id + 1
    whole: bytes = model.SerializeToString()
    return whole


def _taken(path: Path, mask: str) -> DataError:
    others = ", ".join(name for name in MASK_NAMES if name != mask)
    return DataError(f"{path}: {mask!r} is a token of it, which text can hold: choose another name by --mask: {others}")


def _beside(path: Path, mask: str) -> dict[str, bytes]:
    """The settings that lie beside a tokenizer, with the mask named in them."""
    found = {name: file.read_bytes() for name in BESIDE if (file := path.with_name(name)).is_file()}
    if (name := BESIDE[0]) in found:
        try:
            settings = orjson.loads(found[name])
        except ValueError as error:
            raise DataError(f"{path.with_name(name)}: not valid JSON ({error})") from error
        if isinstance(settings, dict):
            found[name] = orjson.dumps({**settings, "mask_token": mask}, option=orjson.OPT_INDENT_2) + b"\n"
    return found


def _compare(before: Tokenizer, after: Tokenizer, path: Path, mask: str, mask_token_id: int) -> None:
    if (after.mask_id, after.vocab_size) != (mask_token_id, mask_token_id + 1):
        raise DataError(
            f"{path}: the library gives the new token the id {after.mask_id}, expected {mask_token_id}, the next one: "
            "its ids have holes; fill them first"
        )
    texts = probe_texts(before, [*before.special_names(), mask])
    if before.encode_batch(texts) != after.encode_batch(texts):
        raise DataError(f"{path}: with a mask token it would give other ids to text: add one where it was made")
