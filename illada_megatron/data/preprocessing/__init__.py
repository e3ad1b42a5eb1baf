"""Producing a corpus: raw text in any amount -> shards of tokens, on one machine or many."""
