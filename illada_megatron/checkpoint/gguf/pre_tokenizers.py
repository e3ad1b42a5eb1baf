"""How a byte-level tokenizer.json cuts text into words, under the name that llama.cpp has for it.

llama.cpp knows a list of expressions by name (`tokenizer.ggml.pre`), not expressions themselves. Here are those that it
runs as the tokenizers library does, apart from what Unicode's tables of two libraries say of rare characters.

Source: llama.cpp, src/llama-vocab.cpp, llm_tokenizer_bpe and llama_vocab::impl::load.
"""

from typing import Any

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"

# (expressions, ignore_merges) -> name. Of several names of one expression that which leaves spaces before punctuation
# in decoded text, if there is one ("gpt-2" and "olmo" drop them).
_NAMES = {
    ((_GPT2,), False): "trillion",
    ((r"\p{N}", _GPT2), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "dbrx",
    ((_QWEN2,), False): "qwen2",
}
DROPS_SPACES = ("llama-bpe", "dbrx")
"""Names by which llama.cpp drops spaces before punctuation when it decodes."""


def pre_tokenizer_name(definition: dict[str, Any]) -> str | None:
    """Of a tokenizer.json; None: llama.cpp has none for it."""
    expressions = _expressions(definition.get("pre_tokenizer") or {})
    if expressions is None:
        return None
    return _NAMES.get((expressions, bool(definition["model"].get("ignore_merges"))))


def _expressions(pre_tokenizer: dict[str, Any]) -> tuple[str, ...] | None:
    """What cuts the text, one after the other, before it is spelled in bytes; None: something else does."""
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
    *before, last = steps
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    found = [_expression(step) for step in before] + ([_GPT2] if last.get("use_regex", True) else [])
    return None if None in found else tuple(one for one in found if one is not None)


def _expression(step: dict[str, Any]) -> str | None:
    if step.get("type") == "Digits" and step.get("individual_digits"):
        return r"\p{N}"
    if step.get("type") != "Split":
        return None
    kind = step.get("behavior"), step.get("invert", False)
    # expressions that leave nothing between their matches
    if kind not in (("Isolated", False), ("Removed", True)):
        return None
    expression = step["pattern"].get("Regex")
    return expression if isinstance(expression, str) else None
