"""The tokenizer of a run as files that transformers' AutoTokenizer loads, and which give the same ids.

A tokenizer.json is copied. A SentencePiece model is copied and also written as a tokenizer.json: transformers' own
conversions differ between its versions, and this one is compared with SentencePiece on hard texts before it is used.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from illada_megatron.checkpoint.files.storage import Folder
from illada_megatron.checkpoint.hugging_face.safetensors_files import write_file
from illada_megatron.data.errors import DataError
from illada_megatron.data.tokenizers.engine_probes import probe_texts
from illada_megatron.data.tokenizers.finding import find_tokenizer
from illada_megatron.data.tokenizers.tokenizer import SPACE_SIGN, Tokenizer, load_tokenizer

_PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>")
_UNK_NAMES = ("<unk>", "[UNK]", "<|unk|>")
# SentencePiece's types of pieces
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_BPE = 2


@dataclass(frozen=True)
class TokenizerFiles:
    """Ready to be written beside weights."""

    files: dict[str, bytes]
    special_ids: dict[str, int | None]
    """bos, eos, pad."""
    path: Path
    """Of the tokenizer that they were made of."""
    vocab_size: int
    """One more than its largest id."""

    def write(self, place: Folder) -> None:
        for name, content in self.files.items():
            write_file(place, name, content)


def tokenizer_files(
    name: str | Path, max_length: int, mask_token_id: int, option: str = "data.tokenizer_path"
) -> TokenizerFiles:
    """Of the tokenizer that `find_tokenizer` finds, for a model of contexts of `max_length` tokens whose mask is
    `mask_token_id`. Raises DataError where it cannot be read, or cannot be expressed as a tokenizer.json."""
    path = find_tokenizer(name, option)
    words = load_tokenizer(path)
    content = path.read_bytes()
    files = {"tokenizer.json": content}
    if path.suffix == ".model":
        files = {"tokenizer.json": _from_sentencepiece(path, content, words), "tokenizer.model": content}
    ids = {words.piece(token_id): token_id for token_id in range(words.vocab_size)}
    special = {
        "bos": words.bos_id,
        "eos": words.eos_id,
        "pad": next((ids[name] for name in _PAD_NAMES if name in ids), words.eos_id),
    }
    others = {
        "unk": next((ids[name] for name in _UNK_NAMES if name in ids), None),
        # a run may mask with an id that the tokenizer has for a word, or does not have
        "mask": next((ids[name] for name in words.special_names() if ids.get(name) == mask_token_id), None),
    }
    every = (special | others).items()
    names = {f"{kind}_token": words.piece(token_id) for kind, token_id in every if token_id is not None}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        **names,
    }
    if "chat_template" in (beside := _config_beside(path)):
        settings["chat_template"] = beside["chat_template"]
    files["tokenizer_config.json"] = json.dumps(settings, indent=2, ensure_ascii=False).encode()
    files["special_tokens_map.json"] = json.dumps(names, indent=2, ensure_ascii=False).encode()
    template = path.parent / "chat_template.jinja"
    if template.is_file():
        files[template.name] = template.read_bytes()
    return TokenizerFiles(files, special, path, words.vocab_size)


def check_fits(path: Path, token_ids: int, rows: int) -> None:
    """Raises DataError where a tokenizer of `token_ids` ids has some that an embedding of `rows` rows lacks:
    a text with one of them would end in an IndexError."""
    if token_ids > rows:
        raise DataError(
            f"{path}: the tokenizer has {token_ids:,} ids, the model's embedding has {rows:,} rows: this is another "
            "model's tokenizer; give the one that the model was trained with"
        )


def _config_beside(path: Path) -> dict[str, Any]:
    config = path.parent / "tokenizer_config.json"
    if not config.is_file():
        return {}
    try:
        values = json.loads(config.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{config}: not valid JSON ({error})") from error
    return values if isinstance(values, dict) else {}


def _from_sentencepiece(path: Path, content: bytes, words: Tokenizer) -> bytes:
    """A tokenizer.json that encodes as SentencePiece does."""
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers

    proto = sentencepiece_model_pb2.ModelProto.FromString(content)
    tokenizer = Tokenizer(_model(path, proto))
    normalizer = _normalizer(proto.normalizer_spec)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    steps = [decoders.Replace(SPACE_SIGN, " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    pieces = [(piece.piece, piece.type) for piece in proto.pieces]
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name, kind in pieces if kind == _CONTROL])
    # Not as added tokens: the text between those is normalised piece by piece, each with a space in front.
    if kept := sorted((name for name, kind in pieces if kind == _USER_DEFINED), key=len, reverse=True):
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(map(re.escape, kept))), behavior="isolated")
    _compare(path, tokenizer, words)
    return tokenizer.to_str(pretty=True).encode()


def _model(path: Path, proto: Any) -> Any:
    from tokenizers import models

    pieces, trainer = proto.pieces, proto.trainer_spec
    if trainer.model_type != _BPE or proto.normalizer_spec.precompiled_charsmap:
        # the tokenizers library breaks a unigram model's ties otherwise, and normalises combined characters otherwise
        raise DataError(
            f"{path}: a tokenizer.json gives the same ids only for a SentencePiece model of BPE without a "
            f"normalization rule; this one has model_type {trainer.model_type} (BPE is {_BPE}) and the rule "
            f"{proto.normalizer_spec.name!r}: leave the tokenizer out with --no-tokenizer"
        )
    vocabulary = {piece.piece: index for index, piece in enumerate(pieces)}
    # SentencePiece merges the pair whose result has the highest score, whatever two pieces it consists of.
    normal = {piece.piece: piece.score for piece in pieces if piece.type == _NORMAL}
    ranked = [
        (-score, vocabulary[name], name[:cut], name[cut:])
        for name, score in normal.items()
        for cut in range(1, len(name))
        if name[:cut] in normal and name[cut:] in normal
    ]
    merges = [(left, right) for _, _, left, right in sorted(ranked)]
    return models.BPE(
        vocabulary,
        merges,
        unk_token=trainer.unk_piece,
        fuse_unk=True,
        byte_fallback=trainer.byte_fallback,
        ignore_merges=any(piece.type == _USER_DEFINED for piece in pieces),  # no merge makes these
    )


def _normalizer(spec: Any) -> Any:
    """In SentencePiece's order; spaces become its sign at the end."""
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", SPACE_SIGN))
    return normalizers.Sequence(steps) if steps else None


def _compare(path: Path, tokenizer: Any, words: Tokenizer) -> None:
    """On all that is text: the names of special tokens are tokens to transformers, and the space sign is a space."""
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    strange = re.compile("|".join(map(re.escape, [SPACE_SIGN, *sorted(added, key=len, reverse=True)])))
    texts = [strange.sub("", text) for text in probe_texts(words, added)]
    expected = words.encode_batch(texts)
    found = [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    for text, ids, reference in zip(texts, found, expected, strict=True):
        if ids != reference:
            at = next((i for i, pair in enumerate(zip(ids, reference, strict=False)) if pair[0] != pair[1]), None)
            place = min(len(ids), len(reference)) if at is None else at
            raise DataError(
                f"{path}: as a tokenizer.json it would give {text[:80]!r} other ids than SentencePiece from token "
                f"{place} on ({ids[place : place + 3]}, expected {reference[place : place + 3]}): leave the "
                "tokenizer out with --no-tokenizer"
            )
