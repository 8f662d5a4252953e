"""The options of mft serve, apart from its masks and its base."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """The options of mft serve, with the names of its command line.

    masks_file: a file with more tasks, one line name=DIRECTORY for each. SIGHUP reads it again.
    load_from: the directory below which clients may load and unload masks; by default they may not.
    force: whether masks may have been learned on another base.
    host, port: the address to listen on; port 0 for a free one.
    api_keys_file: a file with one key per line, one of which clients must send. SIGHUP reads it again. By default no
        key is needed.
    allow_host: names by which clients may address a service on loopback, in addition to loopback's own.
    rows, waiting: the most requests that are answered at once, and the most that wait in addition.
    length: most tokens of a prompt with its answer; by default the number of positions of the base.
    max_tokens: most tokens of an answer if the request does not say; by default 16, and for a chat what length leaves.
    timeout: seconds after which a request is refused, waiting or not; by default none.
    grace: seconds in which running requests may end after the service is asked to stop.
    log_format, log_level, log_zone: as for log.new_log.
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
