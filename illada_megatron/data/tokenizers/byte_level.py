"""A byte-level BPE in GPT-2's two files, vocab.json and merges.txt, as one tokenizer.json."""

from dataclasses import dataclass
from pathlib import Path

from illada_megatron.data.errors import DataError
from illada_megatron.data.tokenizers.tokenizer import BOS_NAMES, EOS_NAMES, MASK_NAMES
from illada_megatron.system.whole_file import replaced

_MASK = "<|mdm_mask|>"


@dataclass(frozen=True)
class ByteLevelBpe:
    content: bytes
    """Of tokenizer.json."""
    vocab_size: int
    mask_id: int


def byte_level_bpe(vocab_file: str | Path, merge_file: str | Path) -> ByteLevelBpe:
    """The ids are those of the `tokenizers` library's ByteLevel BPE of these files (no space is put before a text).

    Names of special tokens in the vocabulary (<|endoftext|>) are special tokens; where none is a mask, one more is
    added behind all ids. Raises DataError: the files are no such vocabulary."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    for path in (vocab_file, merge_file):
        if not Path(path).is_file():
            raise DataError(f"{path}: no such file, expected a vocab.json and a merges.txt of a byte-level BPE")
    try:
        made = tokenizers.Tokenizer(models.BPE.from_file(str(vocab_file), str(merge_file)))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exception, and its panics are none
        raise DataError(f"{vocab_file}, {merge_file}: expected a byte-level BPE, the library says: {error}") from error
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    vocabulary = made.get_vocab()
    missing = [character for character in pre_tokenizers.ByteLevel.alphabet() if character not in vocabulary]
    if missing:
        raise DataError(
            f"{vocab_file}: {len(missing)} of the 256 bytes have no id, texts with them would lose them: expected a "
            "byte-level vocabulary, as GPT-2's"
        )
    names = [name for name in (*EOS_NAMES, *BOS_NAMES, *MASK_NAMES) if name in vocabulary]
    mask = next((name for name in MASK_NAMES if name in vocabulary), _MASK)
    made.add_special_tokens([*names, *([mask] if mask not in names else [])])
    ids = made.get_vocab(with_added_tokens=True)
    return ByteLevelBpe(made.to_str(pretty=False).encode(), max(ids.values()) + 1, ids[mask])


def write_tokenizer_json(vocab_file: str | Path, merge_file: str | Path, path: Path) -> ByteLevelBpe:
    """Writes `path`, which may be there with the same content. Raises DataError where it has another."""
    made = byte_level_bpe(vocab_file, merge_file)
    if path.exists():
        if path.read_bytes() != made.content:
            raise DataError(
                f"{path} was made of other files than {vocab_file} and {merge_file}: remove it, or take another "
                "--output-prefix"
            )
        return made
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as file:
        file.write(made.content)
    return made
