"""How texts came, as one HTML page that needs nothing else: a slider over the steps, colours by step or confidence."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from illada_megatron.generation.generator import Result
from illada_megatron.system.whole_file import replaced

_PAGE = Path(__file__).with_name("page.html")
_PLACE = "/*DATA*/"


def page(results: Sequence[Result], piece: Callable[[int], str]) -> str:
    """HTML. piece: text of a token id (from the tokenizer). Raises ValueError where there is no result."""
    if not results:
        raise ValueError("a page shows at least one text")
    data = json.dumps([_shown(result, piece) for result in results])
    # no text ends the script that holds it, or begins a comment in it
    for character in "<>&\u2028\u2029":
        data = data.replace(character, f"\\u{ord(character):04x}")
    return _PAGE.read_text().replace(_PLACE, data)


def write_page(path: Path, results: Sequence[Result], piece: Callable[[int], str]) -> None:
    """`page` to a file, whole or not at all. Raises OSError."""
    content = page(results, piece).encode()
    with replaced(path) as file:
        file.write(content)


def _shown(result: Result, piece: Callable[[int], str]) -> dict[str, object]:
    return {
        "pieces": [piece(token) for token in result.tokens.tolist()],
        "order": result.order.tolist(),
        "appended": result.appended.tolist(),
        "confidence": [round(one, 6) for one in result.confidence.tolist()],
        "steps": result.steps,
    }
