"""From text to samples: tokenizers, preprocessing, the indexed dataset and the corpus that training reads."""

from illada_megatron.data.blend import BlendSchedule, Proportions
from illada_megatron.data.blended_corpus import BlendedCorpus
from illada_megatron.data.configured import epoch_problems, training_corpus, validation_corpus
from illada_megatron.data.corpus import Corpus
from illada_megatron.data.errors import DataError
from illada_megatron.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter, check_token_ids
from illada_megatron.data.manifest import Manifest, ShardEntry, read_manifest, write_manifest
from illada_megatron.data.order import derive_key, permute
from illada_megatron.data.preprocessing import PreprocessOptions, PreprocessSummary, preprocess
from illada_megatron.data.shards import find_shards, list_shards
from illada_megatron.data.statistics import unigram_entropy
from illada_megatron.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer
from illada_megatron.data.train_tokenizer import train_sentencepiece

__all__ = [
    "BlendSchedule",
    "BlendedCorpus",
    "Corpus",
    "DataError",
    "HuggingFaceTokenizer",
    "IndexedDataset",
    "IndexedDatasetWriter",
    "Manifest",
    "PreprocessOptions",
    "PreprocessSummary",
    "Proportions",
    "SentencePieceTokenizer",
    "ShardEntry",
    "Tokenizer",
    "check_token_ids",
    "derive_key",
    "epoch_problems",
    "find_shards",
    "list_shards",
    "load_tokenizer",
    "permute",
    "preprocess",
    "read_manifest",
    "train_sentencepiece",
    "training_corpus",
    "unigram_entropy",
    "validation_corpus",
    "write_manifest",
]
