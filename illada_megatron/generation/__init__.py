"""Text out of a mask predictor, through a `predict(tokens) -> logits` callable."""
