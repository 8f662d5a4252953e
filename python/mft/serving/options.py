"""The options of mft serve, apart from its masks and its base."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """The options of mft serve, with the names of its command line, whose help explains them.

    masks_file: SIGHUP reads it again; so it does with api_keys_file and admin_keys_file. port: 0 for a free one.
    cache: bytes for keys and values; by default half of the memory that is free once the base and its masks are loaded.
    rows, waiting: the most requests that are answered at once, by default as many of 512 tokens as the cache holds, but
        at most 32; and the most that wait in addition.
    length: by default the number of positions of the base, or of tokens that the cache holds.
    max_tokens: if the request does not say; by default 16, and for a chat what length leaves.
    timeout: seconds after which a request is refused, waiting or not; by default none.
    """

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
