"""The tokenizers of benchmarks/data/preprocess.py, trained on the machine's own text."""

import json
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, pre_tokenizers

from illada_megatron.data.preprocessing.train_tokenizer import train_sentencepiece

# the split of Llama 3 and GPT-4: up to three digits, one sign before a word
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train(jsonl: str, bpe_path: str, sentencepiece_path: str, vocab_size: str) -> None:
    """Write a tokenizer.json (byte-level BPE) and a SentencePiece BPE .model."""
    with Path(jsonl).open(encoding="utf-8") as stream:
        texts = [json.loads(line)["text"] for line in stream]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=int(vocab_size),
        special_tokens=["<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(bpe_path)
    train_sentencepiece([jsonl], sentencepiece_path, vocab_size=int(vocab_size), num_threads=2)
