"""From text to samples: tokenizers, preprocessing, the indexed dataset and the corpora that training reads.

In: text; out: samples of token ids, as numpy arrays.
Never imported here: torch, megatron-core (a worker of `illada preprocess` starts in a third of a second because of it).
"""
