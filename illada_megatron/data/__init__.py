"""From text to samples: tokenizers, preprocessing, the indexed dataset and the corpus that training reads."""

from illada_megatron.data.corpus import Corpus, resolve_prefixes
from illada_megatron.data.errors import DataError
from illada_megatron.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter, check_token_ids
from illada_megatron.data.order import derive_key, permute
from illada_megatron.data.preprocessing import PreprocessOptions, PreprocessSummary, preprocess
from illada_megatron.data.statistics import unigram_entropy
from illada_megatron.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer
from illada_megatron.data.train_tokenizer import train_sentencepiece

__all__ = [
    "Corpus",
    "DataError",
    "HuggingFaceTokenizer",
    "IndexedDataset",
    "IndexedDatasetWriter",
    "PreprocessOptions",
    "PreprocessSummary",
    "SentencePieceTokenizer",
    "Tokenizer",
    "check_token_ids",
    "derive_key",
    "load_tokenizer",
    "permute",
    "preprocess",
    "resolve_prefixes",
    "train_sentencepiece",
    "unigram_entropy",
]
