"""API keys: clients with one of a file's keys may send requests under /v1. Keys themselves are not kept or logged."""

import hashlib
import hmac
import stat
from collections.abc import Callable
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import Scope

from mft.checks import check_rule
from mft.serving.refusal import Refused
from mft.serving.task_list import read_listed

GUARDED = "/v1"  # health and metrics need no key, for monitoring


class ApiKeys:
    """The keys of a file, one per line. warn: called with a message if all users can read it. Raises: as read_again."""

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self._path, self._warn = path, warn
        self._digests: list[bytes] = []
        self.read_again()

    def __len__(self) -> int:
        return len(self._digests)

    def read_again(self) -> None:
        """Read the file again. Raises: ValueError that names the line, or OSError; the keys then stay."""
        lines = read_listed("--api-keys-file", "a key", self._path).splitlines()
        mode = stat.S_IMODE(self._path.stat().st_mode)
        digests = []
        for number, line in enumerate(lines, 1):
            key = line.strip()
            if not key or key.startswith(b"#"):
                continue
            check_rule(
                all(33 <= byte <= 126 for byte in key),
                "--api-keys-file",
                "hold keys of printable ASCII characters without spaces, one per line",
                f"others in line {number} of {self._path}",
            )
            digests.append(_digest(key))
        check_rule(
            bool(digests), "--api-keys-file", "hold at least one key, in a line of its own", f"none in {self._path}"
        )
        if mode & stat.S_IROTH:
            self._warn(
                f"--api-keys-file should be readable by its owner alone, got mode {mode:03o} for {self._path}: "
                f"chmod 600 {self._path}"
            )
        self._digests = digests

    def know(self, key: str) -> bool:
        """Return whether key is one of the keys. The time does not depend on how much of it is right."""
        given, found = _digest(key.encode()), False
        for digest in self._digests:
            found |= hmac.compare_digest(given, digest)
        return found


def check_key(scope: Scope, keys: ApiKeys | None) -> None:
    """Raise Refused (401) if a request has none of the keys. keys: None to refuse nobody."""
    if keys is None or not scope["path"].startswith(GUARDED):
        return
    scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
    is_bearer = scheme.lower() == "bearer"
    if not (is_bearer and keys.know(key.strip())):
        got = "another key" if is_bearer else "another scheme" if scheme else "none"
        message = f"Authorization must be Bearer and one of the server's keys (--api-keys-file), got {got}"
        raise Refused(message, status=401, code="invalid_api_key")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
