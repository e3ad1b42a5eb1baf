"""What takes long to find out and always comes out the same, kept in the user's cache directory."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import xxhash
from platformdirs import user_cache_path

from illada_megatron.system.whole_file import replaced


class Kept:
    """One thing, by all that decides how it comes out. What cannot be read or written, or has been damaged, is not
    there, and has to be found out again."""

    def __init__(self, kind: str, decisive: Sequence[str]) -> None:
        name = hashlib.sha256(json.dumps(list(decisive)).encode()).hexdigest()
        self.path: Path = user_cache_path("illada-megatron") / kind / name

    def get(self) -> bytes | None:
        with suppress(OSError):
            checksum, _, content = self.path.read_bytes().partition(b"\n")
            if checksum == _checksum(content):
                return content
        return None

    def put(self, content: bytes) -> None:
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replaced(self.path) as file:
                file.write(_checksum(content) + b"\n" + content)


def _checksum(content: bytes) -> bytes:
    return xxhash.xxh3_128_hexdigest(content).encode()
