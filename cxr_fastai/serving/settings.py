"""How a service is offered: where, to whom, and what it bears."""
from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Limits:
    """What one request may bring: `body` bytes in all and `films` files."""
    body: int = 20*2**20
    films: int = 64


@dataclass(frozen=True)
class Settings:
    """How the service of `bundle` is offered. `token` None asks for none, `per_client` 0 counts nobody; `seconds` are
    for the answer to a request, `sending` for the request itself, `drain` for those under way when the service ends,
    `wait` for other films to be computed with."""
    bundle: Path
    host: str = '127.0.0.1'
    port: int = 8000
    limits: Limits = field(default_factory=Limits)
    queue: int = 32
    per_client: int = 0
    seconds: float = 30
    sending: float = 10
    drain: float = 8
    batch: int = 16
    wait: float = 0.004
    token: str | None = field(default=None, repr=False)
    hosts: tuple[str, ...] = ()
