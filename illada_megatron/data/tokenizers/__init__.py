"""Tokenizers: text <-> token ids, and faster engines whose ids are proven equal to the reference's.

In: a tokenizer's file and texts.
Out: ids, and what a tokenizer is (its fingerprint).
Never imported here: shards, corpora, preprocessing, torch.
"""
