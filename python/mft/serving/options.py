"""What mft serve may be told beside its masks and its base."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """Of mft serve, under the names of its command line.

    host, port: port 0 for a free one.
    allow_host: names by which clients may ask a service on loopback, besides loopback's own.
    rows, waiting: requests that are answered at once, and that may wait beside them.
    length: tokens of a prompt with its answer; by default as many as the base has positions for.
    max_tokens: of an answer for which the request names none; by default 16, and of a chat what length leaves.
    timeout: seconds after which a request that waits or is answered is refused; by default none.
    grace: seconds that what is being answered gets when the service is to stop.
    log_format, log_level, log_zone: as in log.new_log.
    """

    force: bool = False
    host: str = "127.0.0.1"
    port: int = 8000
    allow_host: Sequence[str] = ()
    rows: int = 8
    waiting: int = 64
    length: int | None = None
    max_tokens: int | None = None
    timeout: float | None = None
    grace: float = 30
    log_format: str = "text"
    log_level: str = "info"
    log_zone: str = "local"
