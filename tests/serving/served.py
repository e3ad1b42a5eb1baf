"""What tests hold of a server that runs in a thread of theirs."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import httpx
import openai


@dataclass(frozen=True)
class Served:
    url: str
    end: Callable[[], None]

    def client(self, key: str = "none") -> openai.OpenAI:
        """OpenAI's, which does not try again by itself here."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=300)

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=300)


Serving = Callable[..., AbstractContextManager[Served]]


Serving = Callable[..., AbstractContextManager[Served]]
