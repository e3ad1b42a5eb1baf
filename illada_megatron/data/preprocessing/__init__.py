"""Producing a corpus: raw text in any amount -> shards of tokens, on one machine or many."""

from illada_megatron.data.preprocessing.run import PreprocessOptions, PreprocessSummary, preprocess

__all__ = ["PreprocessOptions", "PreprocessSummary", "preprocess"]
