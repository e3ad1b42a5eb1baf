"""The one exception of the data side."""


class DataError(ValueError):
    """Input that cannot be used: text, tokenizer or shards. The message names the file, what was found, what was
    expected and what to do."""
