"""The server's log: one line per event from a given level on, as text or as JSON, with times in one zone."""

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, tzinfo
from typing import Any
from zoneinfo import ZoneInfo

from mft.checks import one_of
from mft.escaping import one_line
from mft.tracking.console import say

LEVELS = ("debug", "info", "warning", "error")


class Lines(logging.Formatter):
    """A format of the log's lines. zone: the zone of the times; None for this machine's zone."""

    def __init__(self, zone: tzinfo | None) -> None:
        super().__init__()
        self._zone = zone

    def time(self, record: logging.LogRecord) -> datetime:
        return datetime.fromtimestamp(record.created, UTC).astimezone(self._zone)


class TextLines(Lines):
    """Lines such as 2026-11-27 06:18:37+01:00 info the message"""

    def format(self, record: logging.LogRecord) -> str:
        time = self.time(record).isoformat(" ", "seconds")
        line = f"{time} {record.levelname.lower()} {one_line(record.getMessage())}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonLines(Lines):
    """One JSON object per line: time, level, event, message, and the fields of the event, such as request_id."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": self.time(record).isoformat("T", "milliseconds"),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", record.name),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


FORMATS: dict[str, type[Lines]] = {"text": TextLines, "json": JsonLines}


class Log(logging.Logger):
    """The logger of one server, apart from the process's other loggers. write: is called with each line."""

    def __init__(self, lines: Lines, level: str = "info", write: Callable[[str], None] = say) -> None:
        super().__init__("mft serve", level.upper())
        self._handler = _Written(write)
        self._handler.setFormatter(lines)
        self.addHandler(self._handler)

    def tell(self, event: str, message: str, *, level: int = logging.INFO, **fields: Any) -> None:
        """Log one line. fields: additional fields of the JSON format."""
        self.log(level, "%s", message, extra={"event": event, "fields": fields})

    @contextlib.contextmanager
    def log_libraries(self) -> Iterator[None]:
        """Also log here what libraries log in the block, such as the traceback of an error."""
        root = logging.getLogger()
        root.addHandler(self._handler)
        try:
            yield
        finally:
            root.removeHandler(self._handler)


def read_zone(name: str) -> tzinfo | None:
    """Return the zone that --log-zone names, None for local. Raises: ValueError if there is no such zone."""
    if name == "local":
        return None
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # an unknown zone, an invalid name, a folder of zones
        raise ValueError(
            "--log-zone must be local, UTC or a name of the time zone database such as Europe/Berlin, got "
            f"{name!r}; if the name is right, install the database: pip install tzdata"
        ) from None


def new_log(form: str, level: str, zone: str) -> Log:
    """Return the log for --log-format, --log-level and --log-zone. Raises: ValueError that names the option."""
    one_of(tuple(FORMATS)).check("--log-format", form)
    one_of(LEVELS).check("--log-level", level)
    return Log(FORMATS[form](read_zone(zone)), level)


class _Written(logging.Handler):
    def __init__(self, write: Callable[[str], None]) -> None:
        super().__init__()
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._write(self.format(record))
        except OSError:  # a full disk or a broken pipe is no reason to refuse a request
            self.handleError(record)
