"""Tokenizers of this package's sources, and texts on which tokenizers differ."""

import io
import json
from pathlib import Path

from illada_megatron.data.preprocessing.train_tokenizer import train_sentencepiece

SOURCES = sorted((Path(__file__).parents[2] / "illada_megatron" / "data").rglob("*.py"))
HARD = [
    "",
    " ",
    "def f(x):\n    return {'a': [1, 2.5], **x}  # ok?\n\n\tif a  and b:\r\n",
    "naïve café cafe\u0301 漢字かな 👩‍👩‍👧 مرحبا \u00a0\u3000",
    "  leading, trailing  and    runs   ",
    "it's IT'S we'll WE'LL they've I'd I'M you're 's 'S don’t 'LL'll're've",
    "0123456789" * 30 + " 1 12 123 1234 ١٢٣٤ ½ ²",
    "the end</s> of <s> <mask> <|endoftext|><|mdm_mask|> [MASK]",
    "<0x41> <unk> [PAD3] a\n\n\n b \n c\r\n\r\n",
]
"""Nothing that says ▁, which SentencePiece writes for a space."""


def our_sentencepiece(folder: Path) -> Path:
    """As tools/train_tokenizer.py makes it: 600 ids, the mask is 5."""
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": source.read_text()}) + "\n" for source in SOURCES))
    return train_sentencepiece([corpus], folder / "t.model", vocab_size=600)


def byte_level(path: Path, pre_tokenizer: object, ignore_merges: bool = False, **changes: object) -> Path:
    """A tokenizer.json of BPE, whose text is cut by a pre-tokenizer of the tokenizers library: 700 ids, of which 1 is
    the mask. changes: of its definition."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=698,
        special_tokens=["<|endoftext|>", "<|mdm_mask|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(source) for source in SOURCES], trainer)
    tokenizer.add_tokens(["<user>", "==="])
    path.write_text(json.dumps({**json.loads(tokenizer.to_str()), **changes}))
    return path


def trained_sentencepiece(path: Path, **settings: object) -> Path:
    """With settings of one's own."""
    import sentencepiece

    model = io.BytesIO()
    lines = "\n".join(source.read_text() for source in SOURCES).splitlines()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=600, minloglevel=2, **settings
    )
    path.write_bytes(model.getvalue())
    return path
