"""How libraries compared with the reference on the built-in texts, remembered in the user's cache directory.

That comparison takes a second or more and comes out the same for the same tokenizer file, library, texts and
processor; whatever of these changes, it is made anew. The user's own texts are compared in every run."""

import hashlib
import platform
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import pydantic

from illada_megatron.data.tokenizers.engine_libraries import library_version
from illada_megatron.data.tokenizers.kept import Kept

# the texts, how libraries are opened and compared, and what the reference is
_DECISIVE_MODULES = ("engine_probes", "engine_libraries", "engines", "tokenizer")
# of the reference, whichever it is
_REFERENCES = ("tokenizers", "sentencepiece")


class Verdict(pydantic.BaseModel, frozen=True, extra="forbid"):
    """Of one library on one tokenizer."""

    refused: str | None
    """Why it is not used; None: it gave the reference's ids."""
    texts: int
    characters: int
    """Of the built-in texts."""


class Verdicts:
    """On one tokenizer. Libraries whose verdict is not kept are compared again."""

    def __init__(self, tokenizer_fingerprint: str) -> None:
        self._fingerprint = tokenizer_fingerprint

    def get(self, library: str) -> Verdict | None:
        content = self._kept(library).get()
        if content is not None:
            with suppress(ValueError):  # of another version of this file
                return Verdict.model_validate_json(content)
        return None

    def put(self, library: str, verdict: Verdict) -> None:
        self._kept(library).put(verdict.model_dump_json().encode())

    def _kept(self, library: str) -> Kept:
        decisive = [self._fingerprint, library, library_version(library), *map(version, _REFERENCES), *_surroundings()]
        return Kept("tokenizer_engines", decisive)


def _surroundings() -> Sequence[str]:
    """What else decides: the texts, which are made of Unicode's tables, how libraries are opened, and the processor,
    for whose instructions they may have code of its own."""
    sources = [Path(__file__).with_name(f"{name}.py").read_bytes() for name in _DECISIVE_MODULES]
    return [*(hashlib.sha256(source).hexdigest() for source in sources), unicodedata.unidata_version, _processor()]


def _processor() -> str:
    with suppress(OSError), Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
        for line in lines:
            if line.startswith(("flags", "Features")):
                return line
    return f"{platform.machine()} {platform.processor()}"
