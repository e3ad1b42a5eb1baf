"""Tokenizers of all kinds that users bring, by how they cut text into words."""

from typing import Any

from tokenizers import Regex, pre_tokenizers

GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
OWN = r"\d+|[^\W\d]+|\s+|[^\w\s]+"
PRE_TOKENIZERS: dict[str, Any] = {
    "gpt4": [pre_tokenizers.Split(Regex(GPT4), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)],
    "qwen": [
        pre_tokenizers.Split(Regex(GPT4.replace("{1,3}", "")), "isolated"),
        pre_tokenizers.ByteLevel(False, use_regex=False),
    ],
    "digits": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)],
    "own": [pre_tokenizers.Split(Regex(OWN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)],
}
KINDS = ["sentencepiece", "unigram", "gpt2", *PRE_TOKENIZERS]
