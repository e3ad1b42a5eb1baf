"""Producing a corpus: raw text in any amount -> shards of tokens, on one machine or many.

In: JSONL, Parquet, text, conversations; a tokenizer.
Out: shards and the manifest that lists them.
Never imported here: torch, megatron-core, the configuration of a run.
"""
