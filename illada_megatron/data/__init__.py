"""From text to samples: tokenizers, preprocessing, the indexed dataset and the corpora that training reads.

Nothing is imported here: a worker of `illada preprocess` starts in a third of a second because of it."""
