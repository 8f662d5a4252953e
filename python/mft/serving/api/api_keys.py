"""API keys: clients with a key from a file may send requests under /v1. Keys themselves are not kept or logged."""

import hashlib
import hmac
import re
import stat
from collections.abc import Callable
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import Scope

from mft.checks import check_rule
from mft.serving.api.exchange import exchange_of
from mft.serving.key import EVERYTHING, Key
from mft.serving.refusal import Refused
from mft.serving.task_list import check_name, read_listed

GUARDED = ("/v1", "/tokenize")  # health and metrics need no key, for monitoring
USERS, ADMINS = "--api-keys-file", "--admin-keys-file"
_NAME = re.compile(rb"(?!sk-)[A-Za-z0-9][A-Za-z0-9._-]{0,31}")  # too short for a generated key in the name's place
_SHORTEST = 8  # characters of a key with a name: fewer are rather a task in the key's place


class ApiKeys:
    """The keys of --api-keys-file (path) and --admin-keys-file (admins), of which one may be None.

    A line is a key, `name key` or `name key task,task`. Without tasks, a key may call all of them and the base. Admins'
    keys may also load and unload masks. A key without a name is called line-N, or admin-line-N.
    warn: called with a message if all users can read a file. Raises: as read_again.
    """

    def __init__(self, path: Path | None, warn: Callable[[str], None], admins: Path | None = None) -> None:
        self._files = {option: file for option, file in ((USERS, path), (ADMINS, admins)) if file is not None}
        self._warn = warn
        self._keys: dict[bytes, Key] = {}  # by digest
        self.read_again()

    def __len__(self) -> int:
        return len(self._keys)

    def read_again(self) -> None:
        """Read the files again. Raises: ValueError that names the line, or OSError; the keys then stay."""
        keys: dict[bytes, Key] = {}
        places: dict[str | bytes, str] = {}  # of each name and each digest
        for option, path in self._files.items():
            numbers: dict[bytes, int] = {}
            for number, line in enumerate(read_listed(option, "a key", path).splitlines(), 1):
                if line.strip() and not line.strip().startswith(b"#"):
                    numbers.setdefault(line.strip(), number)  # a line that is repeated says nothing new
            check_rule(bool(numbers), option, "hold at least one key, in a line of its own", f"none in {path}")
            for line, number in numbers.items():
                digest, key = _read_line(option, line, number, where := f"line {number} of {path}")
                for found, rule in ((key.name, "name each key differently"), (digest, "hold each key once")):
                    got = repr(found) if isinstance(found, str) else "one"
                    check_rule(found not in places, option, rule, f"{got} in {places.get(found)} and in {where}")
                    places[found] = where
                keys[digest] = key
        for option, path in self._files.items():
            mode = stat.S_IMODE(path.stat().st_mode)
            if mode & stat.S_IROTH:
                self._warn(
                    f"{option} should be readable by its owner alone, got mode {mode:03o} for {path}: chmod 600 {path}"
                )
        self._keys = keys

    def find(self, key: str) -> Key | None:
        """Return the rights of a key, None if it is not known. The time does not depend on how much of it is right."""
        given, found = _digest(key.encode()), None
        for digest, known in self._keys.items():
            if hmac.compare_digest(given, digest):
                found = known
        return found


def check_key(scope: Scope, keys: ApiKeys | None) -> None:
    """Give a request its key's rights. Raises: Refused (401) if it has no valid key. keys: None to refuse nobody."""
    exchange = exchange_of(scope)
    if keys is None:
        exchange.key = EVERYTHING
    elif scope["path"].startswith(GUARDED):
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        is_bearer = scheme.lower() == "bearer"
        found = keys.find(key.strip()) if is_bearer else None
        if found is None:
            got = "another key" if is_bearer else "another scheme" if scheme else "none"
            message = f"Authorization must be Bearer and one of the server's keys ({USERS}), got {got}"
            raise Refused(message, status=401, code="invalid_api_key")
        exchange.key = found


def _read_line(option: str, line: bytes, number: int, where: str) -> tuple[bytes, Key]:
    """Return (digest, rights) of a line's key. No message shows a word of the line, which may be a misplaced key."""
    words, is_admin = line.split(), option == ADMINS
    name, key, *tasks = words if len(words) > 1 else (b"admin-" * is_admin + b"line-%d" % number, *words)
    order = "write the name, the key and its tasks in this order"
    for holds, rule, got in (
        (
            all(33 <= byte <= 126 for byte in b"".join(words)),
            "hold keys of printable ASCII characters, one per line",
            f"others in {where}",
        ),
        (
            len(tasks) <= (not is_admin),
            "hold only names and keys" if is_admin else "hold a name, a key and tasks such as a,b per line",
            f"{len(words)} words in {where}: "
            + ("remove the tasks, as admins may call all" if is_admin else "put no space between tasks"),
        ),
        (
            _NAME.fullmatch(name) is not None,
            "name a key by 1 to 32 letters, digits and . _ -, the first a letter or a digit, but not sk-",
            f"another name in {where}: {order}",
        ),
        (
            len(words) == 1 or len(key) >= _SHORTEST,
            f"hold keys of at least {_SHORTEST} characters behind their names",
            f"{len(key)} in {where}: {order}",
        ),
    ):
        check_rule(holds, option, rule, got)
    allowed = [task.decode() for each in tasks for task in each.split(b",")]
    for place, task in enumerate(allowed, 1):
        check_name(
            option, task, f"another as task {place} in {where}: correct it, or leave all out to allow every task"
        )
    return _digest(key), Key(name.decode(), frozenset(allowed) if allowed else None, is_admin)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
