"""Trains a SentencePiece tokenizer that gives source code back exactly, with the mask token at iLLaDA's id."""

import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from illada_megatron.data.errors import DataError
from illada_megatron.data.preprocessing.documents import read_texts
from illada_megatron.data.preprocessing.inputs import described, find_inputs
from illada_megatron.data.tokenizers.finding import NAMES
from illada_megatron.system.terminal import say
from illada_megatron.system.whole_file import replaced

# SentencePiece places control symbols behind the four classic ones in the order given: the mask becomes id 5, as in
# iLLaDA. <sep> (id 4) is for data that needs a boundary inside a document, such as prompt | response.
UNK_ID, BOS_ID, EOS_ID, PAD_ID = 0, 1, 2, 3
CONTROL_SYMBOLS = ["<sep>", "<mask>"]
MASK_ID = 5

_PASSAGE_BYTES = 4000


def train_sentencepiece(
    jsonl_paths: Sequence[str | Path],
    output_path: str | Path,
    vocab_size: int = 8000,
    model_type: Literal["bpe", "unigram"] = "bpe",
    text_key: str = "text",
    max_passages: int = 200_000,
    num_threads: int = 4,
) -> Path:
    """Train on the `text_key` of every line and write `output_path` (ending in .model, written whole or not at all;
    a directory gets a tokenizer.model).

    Nothing is normalised; runs of spaces and newlines can be pieces; each digit is its own piece; characters that
    are not in the vocabulary are spelled in bytes. So decode(encode(text)) == text for every text.
    Text is cut into passages of whole lines of about 4 kB; of more than `max_passages` a random choice is used
    (a corpus beyond some 800 MB does not make a better vocabulary, only a slower training).

    Special tokens: <unk> 0, <s> 1, </s> 2, <pad> 3, <sep> 4, <mask> 5.

    Raises DataError for unreadable input, no text at all, or a vocab_size the text cannot fill."""
    import sentencepiece

    output_path = Path(output_path)
    if output_path.is_dir():
        output_path /= NAMES[1]
    if output_path.suffix != ".model":
        raise DataError(f"{output_path}: a SentencePiece model is expected to end in .model; choose such a name")
    inputs = find_inputs(jsonl_paths)
    if left_out := described(inputs.left_out):
        say(f"left out of directories and globs: {left_out}", error=True)
    passages = _passages(read_texts(inputs.files, text_key))
    first = next(passages, None)
    if first is None:
        raise DataError(f"{', '.join(map(str, jsonl_paths))}: no text to train on, expected a line with text in it")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain([first], passages),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            num_threads=num_threads,
            input_sentence_size=max_passages,
            shuffle_input_sentence=True,
            max_sentence_length=4 * _PASSAGE_BYTES,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            byte_fallback=True,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=PAD_ID,
            control_symbols=CONTROL_SYMBOLS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(
            f"{', '.join(map(str, jsonl_paths))}: no tokenizer of {vocab_size} pieces could be trained, SentencePiece "
            f"says: {error}"
        ) from error
    return _write_model(model.getvalue(), output_path)


def _passages(texts: Iterator[str]) -> Iterator[str]:
    """Whole lines, gathered to at most _PASSAGE_BYTES characters; a longer line is cut."""
    for text in texts:
        passage = ""
        for line in text.splitlines(keepends=True):
            if passage and len(passage) + len(line) > _PASSAGE_BYTES:
                yield passage
                passage = ""
            passage += line
            while len(passage) > _PASSAGE_BYTES:
                yield passage[:_PASSAGE_BYTES]
                passage = passage[_PASSAGE_BYTES:]
        if passage:
            yield passage


def _write_model(model: bytes, output_path: Path) -> Path:
    import sentencepiece

    mask_id = sentencepiece.SentencePieceProcessor(model_proto=model).piece_to_id(CONTROL_SYMBOLS[-1])
    if mask_id != MASK_ID:
        raise DataError(
            f"{output_path}: SentencePiece gave the mask token the id {mask_id}, expected {MASK_ID}; "
            "this release of sentencepiece orders control symbols differently: install another one"
        )
    output_path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(output_path) as file:
        file.write(model)
    return output_path
