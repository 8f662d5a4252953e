"""What mft serve may be told beside its masks and its base."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """Of mft serve, under the names of its command line.

    masks_file: more tasks, a line name=DIRECTORY each, which SIGHUP reads again.
    load_from: the directory below which masks lie that clients may load and unload; by default they may not.
    force: whether masks may have been learned on another base.
    host, port: port 0 for a free one.
    api_keys_file: a key per line, one of which clients have to send; SIGHUP reads it again. By default none is asked.
    allow_host: names by which clients may ask a service on loopback, besides loopback's own.
    rows, waiting: requests that are answered at once, and that may wait beside them.
    length: tokens of a prompt with its answer; by default as many as the base has positions for.
    max_tokens: of an answer for which the request names none; by default 16, and of a chat what length leaves.
    timeout: seconds after which a request that waits or is answered is refused; by default none.
    grace: seconds that what is being answered gets when the service is to stop.
    log_format, log_level, log_zone: as in log.new_log.
    """

    masks_file: Path | None = None
    load_from: Path | None = None
    force: bool = False
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys_file: Path | None = None
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
