"""A run's tokenizer as a GGUF file has it, with which llama.cpp gives the same ids.

    tokenizer.ggml.model    llama: SentencePiece's BPE; gpt2: byte-level BPE of a tokenizer.json; no_vocab: ids alone

What llama.cpp would read otherwise is refused; what differs in texts that hardly occur is in `Vocabulary.notes`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from illada_megatron.checkpoint.gguf.pre_tokenizers import DROPS_SPACES, pre_tokenizer_name
from illada_megatron.data.errors import DataError
from illada_megatron.data.tokenizers.finding import find_tokenizer
from illada_megatron.data.tokenizers.spelling import is_byte_level
from illada_megatron.data.tokenizers.tokenizer import SPACE_SIGN, Tokenizer, load_tokenizer

# Types of tokens: gguf's are SentencePiece's.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_BPE = 2  # SentencePiece's model_type
_OUT = "leave the tokenizer out with --no-tokenizer, and give llama.cpp ids"


@dataclass(frozen=True)
class Vocabulary:
    """Ready to be written."""

    path: Path
    """Of the tokenizer that it was made of."""
    model: str
    pre: str
    tokens: list[str]
    """Empty: there is none of this id."""
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None
    space_prefix: bool
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    notes: tuple[str, ...]
    """Where llama.cpp gives other ids, or another text of ids, in words."""

    @property
    def vocab_size(self) -> int:
        """One more than its largest id."""
        return len(self.tokens)


def vocabulary(name: str | Path, option: str = "data.tokenizer_path") -> Vocabulary:
    """Of the tokenizer that `find_tokenizer` finds. Raises DataError where llama.cpp cannot do the same."""
    path = find_tokenizer(name, option)
    words, content = load_tokenizer(path), path.read_bytes()
    if path.suffix == ".model":
        return _of_sentencepiece(path, content, words)
    return _of_json(path, json.loads(content), words)


def add_vocabulary(writer: Any, found: Vocabulary | None, rows: int, mask_token_id: int) -> None:
    """All keys of the tokenizer; None: of none. rows: of the embedding, of which each is a token to llama.cpp. writer:
    gguf's GGUFWriter."""
    writer.add_mask_token_id(mask_token_id)
    if found is None:
        writer.add_tokenizer_model("no_vocab")
        return
    missing = rows - found.vocab_size
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(_all_named(found.tokens + [""] * missing))
    writer.add_token_types(found.types + [UNUSED] * missing)
    if found.scores is not None:
        writer.add_token_scores(found.scores + [0.0] * missing)
    if found.merges is not None:
        writer.add_token_merges(found.merges)
    writer.add_add_space_prefix(found.space_prefix)
    writer.add_add_bos_token(False)  # no id is added that the text does not hold
    writer.add_add_eos_token(False)
    # where the tokenizer has none: without the key llama.cpp takes some word for it
    writer.add_bos_token_id(mask_token_id if found.bos_id is None else found.bos_id)
    writer.add_eos_token_id(mask_token_id if found.eos_id is None else found.eos_id)
    if found.unk_id is not None:
        writer.add_unk_token_id(found.unk_id)


def _all_named(tokens: Sequence[str]) -> list[str]:
    """Each by a name of its own, which llama.cpp insists on, those that have none too."""
    taken, names = set(tokens), []
    for token_id, token in enumerate(tokens):
        name = token or f"[PAD{token_id}]"
        while not token and name in taken:
            name = f"[{name}]"
        names.append(name)
    return names


def _of_sentencepiece(path: Path, content: bytes, words: Tokenizer) -> Vocabulary:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(content)
    spec, trainer = proto.normalizer_spec, proto.trainer_spec
    tokens, types = [piece.piece for piece in proto.pieces], [piece.type for piece in proto.pieces]
    users = [name for name, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED]
    _check(
        path,
        (trainer.model_type != _BPE, f"its model_type is {trainer.model_type}, expected {_BPE} (BPE)"),
        (bool(spec.precompiled_charsmap), f"it normalises text by the rule {spec.name!r}"),
        (spec.remove_extra_whitespaces, "it takes runs of spaces together (remove_extra_whitespaces)"),
        (types.count(BYTE) != 256, "it has no pieces for the 256 bytes (byte_fallback), which other characters need"),
        (UNUSED in types, "it has unused pieces"),
        (bool(users) and spec.add_dummy_prefix, f"a space comes before the text behind {users[:1]} there"),
        (any(SPACE_SIGN in name for name in users), "a piece of the user has a space in it"),
    )
    notes = [f"the character {SPACE_SIGN} in a text is a space (here it is itself)"]
    if built := _built_of_text(tokens, types):
        notes.append(f"the characters {', '.join(built)} in a text are that token (here they are characters)")
    unk = types.index(UNKNOWN) if UNKNOWN in types else None
    scores = [piece.score for piece in proto.pieces]
    ids = words.bos_id, words.eos_id, unk
    return Vocabulary(
        path, "llama", "default", tokens, types, scores, None, spec.add_dummy_prefix, *ids, notes=tuple(notes)
    )


def _built_of_text(tokens: Sequence[str], types: Sequence[int]) -> list[str]:
    """Names of control tokens and bytes that llama.cpp makes of text by merging, as it does the names of words; to
    SentencePiece they are no text."""
    there = set(tokens)

    def is_there(part: str) -> bool:
        return len(part) == 1 or part in there

    names = [name for name, kind in zip(tokens, types, strict=True) if kind in (CONTROL, UNKNOWN, BYTE)]
    return [name for name in names if any(is_there(name[:cut]) and is_there(name[cut:]) for cut in range(1, len(name)))]


def _of_json(path: Path, definition: dict[str, Any], words: Tokenizer) -> Vocabulary:
    model, normalizer = definition["model"], definition.get("normalizer")
    normalizer = normalizer and normalizer.get("type")
    added = {one["content"]: one for one in definition.get("added_tokens") or []}
    strips = [one["content"] for one in added.values() if _changes_neighbours(one)]
    pre = pre_tokenizer_name(definition) if model.get("type") == "BPE" else None
    _check(
        path,
        (model.get("type") != "BPE", f"its model is {model.get('type')}, expected BPE"),
        (normalizer not in (None, "NFC"), f"its normalizer is {normalizer}, expected none or NFC"),
        (pre is None, f"llama.cpp has no name for how its pre_tokenizer cuts text: {_short(definition)}"),
        (bool(model.get("dropout")), "it has a dropout"),
        (bool(model.get("continuing_subword_prefix")), "it has a continuing_subword_prefix"),
        (bool(model.get("end_of_word_suffix")), "it has an end_of_word_suffix"),
        (not is_byte_level(model.get("vocab", {})), "some of the 256 bytes are no tokens"),
        (bool(strips), f"{strips[:1]} also takes the spaces beside it, or only whole words"),
    )
    tokens = [words.spelled(token_id) for token_id in range(words.vocab_size)]
    types = [_type(token, added.get(token)) for token in tokens]
    merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    notes = ["text is not normalised: give it NFC"] if normalizer else []
    if pre in DROPS_SPACES:
        notes.append("decoded text has no spaces before punctuation")
    ids = words.bos_id, words.eos_id, None
    return Vocabulary(path, "gpt2", pre or "", tokens, types, None, merges, False, *ids, notes=tuple(notes))


def _type(token: str, added: dict[str, Any] | None) -> int:
    """added: its entry, where it has one."""
    if added is not None:
        return CONTROL if added["special"] else USER_DEFINED
    return NORMAL if token else UNUSED


def _changes_neighbours(token: dict[str, Any]) -> bool:
    """Of what is matched in a text; a special token is never."""
    return not token["special"] and any(token.get(key) for key in ("lstrip", "rstrip", "single_word"))


def _short(definition: dict[str, Any]) -> str:
    text = json.dumps(definition.get("pre_tokenizer"), ensure_ascii=False)
    merges = ", ignore_merges" if definition["model"].get("ignore_merges") else ""
    return (text if len(text) <= 200 else f"{text[:200]}...") + merges


def _check(path: Path, *reasons: tuple[bool, str]) -> None:
    for differs, reason in reasons:
        if differs:
            raise DataError(f"{path}: llama.cpp would give other ids than this tokenizer: {reason}: {_OUT}")
