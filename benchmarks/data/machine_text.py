"""Real text that a machine already has: sources and documentation under the Python environment and /usr.

Nothing is downloaded. Files are read in a fixed order, left out when not UTF-8 or copies of one taken, and cut at line
ends into documents, so that a document is about 8 kB in the mean."""

import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

ROOTS = (
    sysconfig.get_path("stdlib"),
    sysconfig.get_path("purelib"),
    sysconfig.get_path("platlib"),
    "/usr/share",
    "/usr/lib",
    "/usr/include",
    "/usr/local",
)
# text for people and sources by people; no data tables, no logs, no minified bundles
_SUFFIXES = """.py .pyi .pyx .md .rst .txt .html .htm .h .hpp .hh .c .cc .cpp .cu .cuh .js .ts .css .pl .pm .pod .sh .rb
    .el .tcl .java .go .rs .lua .cmake .tex .texi .po .ipynb .yaml .yml .toml .proto .sql .m4 .f90 .r .jl"""
SUFFIXES = frozenset(_SUFFIXES.split())
LARGEST_FILE_BYTES = 4_000_000
DOCUMENT_BYTES = 24_000
LONGEST_LINE = 4_000


def write_corpus(path: Path, text_bytes: int) -> tuple[int, int]:
    """Write {"text": ...} lines with at least `text_bytes` of UTF-8 text; returns (documents, bytes of text).

    Raises RuntimeError when the machine has less."""
    documents = written = 0
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8", newline="\n") as stream:
        for text in _documents():
            stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            documents += 1
            written += len(text.encode())
            if written >= text_bytes:
                break
    if written < text_bytes:
        temporary.unlink()
        raise RuntimeError(
            f"found {written} bytes of text under {', '.join(ROOTS)}, expected {text_bytes}: ask for less"
        )
    temporary.replace(path)
    return documents, written


def _documents() -> Iterator[str]:
    """Documents in an order that mixes the kinds of text: by a hash of the file's path."""
    paths = sorted(_files(), key=lambda path: hashlib.sha256(str(path).encode()).digest())
    seen: set[bytes] = set()
    for path in paths:
        try:
            content = path.read_bytes()
            text = content.decode("utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        digest = hashlib.sha256(content).digest()
        if digest in seen or not text.strip() or max(map(len, text.split("\n"))) > LONGEST_LINE:
            continue
        seen.add(digest)
        yield from _pieces(text)


def _files() -> Iterator[Path]:
    for root in dict.fromkeys(os.path.realpath(root) for root in ROOTS):
        for directory, subdirectories, files in os.walk(root):
            subdirectories[:] = sorted(name for name in subdirectories if name != "__pycache__")
            for name in files:
                path = Path(directory, name)
                wanted = path.suffix.lower() in SUFFIXES and not path.is_symlink()
                if wanted and 0 < path.stat().st_size <= LARGEST_FILE_BYTES:
                    yield path


def _pieces(text: str) -> Iterator[str]:
    """`text` cut at line ends into pieces of about DOCUMENT_BYTES characters at most."""
    piece: list[str] = []
    length = 0
    for line in text.splitlines(keepends=True):
        if piece and length + len(line) > DOCUMENT_BYTES:
            yield "".join(piece)
            piece, length = [], 0
        piece.append(line)
        length += len(line)
    if piece:
        yield "".join(piece)


if __name__ == "__main__":
    print(write_corpus(Path(sys.argv[1]), int(sys.argv[2])))
