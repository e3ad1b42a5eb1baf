"""What the operator of a server allows and chooses."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Options:
    """Raises ValueError where a number is out of its range."""

    name: str
    """Of the model, as requests give it."""
    defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Fields of `Settings` that hold where a request gives none."""
    chat_template: Path | None = None
    """None: the tokenizer's own."""
    keys: tuple[str, ...] = ()
    """API keys, any of which is needed; none: nobody is asked."""
    allowed_hosts: tuple[str, ...] = ("*",)
    """What a request may call this server in its Host header."""

    # limits
    most_running: int = 64
    """Texts that share a pass."""
    most_queued: int = 1024
    """Texts that wait; more are refused with 429."""
    most_texts: int = 16
    """Of one request: prompts times n."""
    most_tokens: int | None = None
    """That one text may ask for; None: what the model's length leaves."""
    most_bytes: int = 1 << 20
    """Of a request's body."""
    per_minute: int = 0
    """Requests of a key, or of an address where there are no keys; 0: any number."""
    body_seconds: float = 30.0
    """Within which each piece of a body arrives."""
    unread_seconds: float = 60.0
    """After which a client that reads nothing of what is sent is disconnected (on Linux)."""
    grace_seconds: float = 30.0
    """For what is in work when the server is told to end."""

    def __post_init__(self) -> None:
        for name in ("most_running", "most_queued", "most_texts", "most_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        for name in ("per_minute", "body_seconds", "unread_seconds", "grace_seconds"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, found {getattr(self, name)}")
        if self.most_tokens is not None and self.most_tokens < 1:
            raise ValueError(f"most_tokens must be at least 1, found {self.most_tokens}")
