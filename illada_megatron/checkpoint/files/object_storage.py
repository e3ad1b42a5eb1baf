"""The objects below a prefix of a bucket as a folder of checkpoints (`storage.Folder`), through obstore.

Credentials, region and endpoint of S3 come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION,
AWS_ENDPOINT_URL; AWS_ALLOW_HTTP=true for an endpoint without TLS). What fails raises OSError.
"""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

SCHEME = "s3://"
# An object's parts, and how many of them are on their way at a time: what a writer holds in memory.
_PART_BYTES = 16 << 20
_PARTS_ON_THEIR_WAY = 4


class ObjectFolder:
    """The objects below `s3://bucket/prefix`. An object is complete and durable when its upload has ended, and does not
    exist before; one request replaces it."""

    block_bytes = _PART_BYTES

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        bucket, _, self._prefix = self.url.removeprefix(SCHEME).partition("/")
        self._bucket = bucket

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> "ObjectFolder":
        return ObjectFolder(self.url.rpartition("/")[0])

    def __truediv__(self, name: str) -> "ObjectFolder":
        return ObjectFolder(f"{self.url}/{name}")

    def exists(self) -> bool:
        found = self._listed()
        return bool(found["objects"] or found["common_prefixes"])

    def folders(self) -> list[str]:
        return sorted(str(prefix).rstrip("/").rpartition("/")[2] for prefix in self._listed()["common_prefixes"])

    def files(self) -> list[str]:
        return sorted(str(entry["path"]).rpartition("/")[2] for entry in self._listed()["objects"])

    def size(self, name: str) -> int | None:
        import obstore

        try:
            with self._errors(name):
                return int(obstore.head(self._store, self._key(name))["size"])
        except FileNotFoundError:
            return None

    def read(self, name: str) -> bytes:
        import obstore

        with self._errors(name):
            return bytes(obstore.get(self._store, self._key(name)).bytes())

    def read_into(self, name: str, offset: int, out: memoryview) -> None:
        import obstore

        with self._errors(name):
            content = obstore.get_range(self._store, self._key(name), start=offset, length=len(out))
            if len(content) != len(out):
                raise OSError(f"{self}/{name}: ends at byte {offset + len(content)}, more was expected")
            out[:] = memoryview(content)

    def create(self, name: str) -> "_ObjectSink":
        return _ObjectSink(self, name)

    def replace(self, name: str, content: bytes) -> None:
        import obstore

        with self._errors(name):
            obstore.put(self._store, self._key(name), content)

    def make(self) -> None:
        """Object storage has no folders."""

    def clear(self) -> None:
        import obstore

        with self._errors(""):
            for batch in obstore.list(self._store, prefix=f"{self._prefix}/"):
                obstore.delete(self._store, [entry["path"] for entry in batch])

    def remove(self, name: str) -> None:
        import obstore

        with contextlib.suppress(FileNotFoundError), self._errors(name):
            obstore.delete(self._store, self._key(name))

    @property
    def _store(self) -> Any:
        return _bucket_store(self._bucket)

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    def _listed(self) -> Any:
        import obstore

        with self._errors(""):
            return obstore.list_with_delimiter(self._store, prefix=self._prefix or None)

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        """obstore's errors as OSError, with the URL."""
        from obstore.exceptions import BaseError, NotFoundError

        where = f"{self}/{name}" if name else str(self)
        try:
            yield
        except (FileNotFoundError, NotFoundError) as error:
            raise FileNotFoundError(f"{where}: no such object") from error
        except BaseError as error:
            raise OSError(
                f"{where}: object storage failed ({type(error).__name__}: {str(error)[:300]}): check the URL, "
                "AWS_REGION, AWS_ENDPOINT_URL and the credentials"
            ) from error


class _ObjectSink:
    def __init__(self, place: ObjectFolder, name: str) -> None:
        import obstore

        self._place, self._name = place, name
        with place._errors(name):
            self._writer = obstore.open_writer(
                place._store, place._key(name), buffer_size=_PART_BYTES, max_concurrency=_PARTS_ON_THEIR_WAY
            )

    def write(self, block: Any) -> None:
        with self._place._errors(self._name):
            self._writer.write(block)

    def close(self) -> None:
        with self._place._errors(self._name):
            self._writer.close()

    def abandon(self) -> None:
        """Uploaded parts are the bucket's to expire: the client has no way to take them back."""


@lru_cache(maxsize=64)
def _bucket_store(bucket: str) -> Any:
    """One client a bucket and process; it is thread-safe and keeps its connections."""
    try:
        from obstore.store import from_url
    except ImportError as error:
        raise OSError(f"s3://{bucket}: needs the package obstore: pip install 'illada-megatron[s3]'") from error
    return from_url(f"{SCHEME}{bucket}")
