"""The corpora that training reads: sample index -> tokens, in an order that is a pure function of the seed.

In: lists of shards, weights, a seed.
Out: the tokens of any sample, without state.
Never imported here: preprocessing, torch, megatron-core.
"""
