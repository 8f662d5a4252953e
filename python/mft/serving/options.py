"""The options of mft serve, apart from its masks and its base."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """The options of mft serve, with the names of its command line, whose help explains them. cache: bytes."""

    masks_file: Path | None = None
    load_from: Path | None = None
    force: bool = False
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys_file: Path | None = None
    admin_keys_file: Path | None = None
    allow_host: Sequence[str] = ()
    cache: int | None = None
    rows: int | None = None
    waiting: int = 64
    length: int | None = None
    max_tokens: int | None = None
    timeout: float | None = None
    grace: float = 30
    log_format: str = "text"
    log_level: str = "info"
    log_zone: str = "local"
