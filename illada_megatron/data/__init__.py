"""From text to samples: tokenizers, preprocessing, the indexed dataset and the corpus that training reads."""
