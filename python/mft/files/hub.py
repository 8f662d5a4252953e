"""The model hub: whether it answers, how its repositories are named, and what its client's errors mean."""

import functools
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.utils import validate_repo_id

TIMEOUT_SECONDS = 5
COMMIT = re.compile(r"[0-9a-f]{40}")  # a revision that never changes
_NAMED = re.compile(r"([\w.-]+/[\w.-]+)(?:@(.+))?", re.ASCII)
# What the client raises. RuntimeError wraps the errors of an upload; HTTPError is also the base of httpx's own errors.
_CLIENT = (
    HTTPError,
    EntryNotFoundError,
    RevisionResolutionError,
    FileMetadataError,
    OfflineModeIsEnabled,
    RuntimeError,
)
_BAD_TOKEN = "Invalid credentials"  # the hub's words for a token that it does not know
_LOG_IN = "`hf auth login`, or set HF_TOKEN"


class HubError(OSError):
    """The hub was not reached, or refused; the message says what to do."""


class NotOnHub(HubError, FileNotFoundError):
    """The hub has no such repository, revision or file, or does not show it to this user."""


@functools.cache
def hub_is_reachable() -> bool:
    """Return whether the hub answers: one request per process to huggingface_hub's endpoint, through usual proxies."""
    if constants.HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS):
            return True
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # somebody answered; the client reports certificate errors
    except OSError:
        return False


def unreachable() -> str:
    """Return why hub_is_reachable returned False, and what to do."""
    if constants.HF_HUB_OFFLINE:
        return "the hub is not asked, as HF_HUB_OFFLINE is set: unset it"
    return f"the hub cannot be reached at {constants.ENDPOINT}: check the network, or HF_ENDPOINT"


def split_hub_id(text: str) -> tuple[str, str | None] | None:
    """Split user/name or user/name@revision into (repository, revision or None); None if text is neither."""
    found = _NAMED.fullmatch(text)
    if found is None:
        return None
    try:
        validate_repo_id(found[1])
    except HFValidationError:
        return None
    return found[1], found[2]


@contextmanager
def translate_hub_errors(repository: str, revision: str | None = None, *, writing: bool = False) -> Iterator[None]:
    """Turn the client's errors into one that names repository, revision and remedy. Raises: HubError, NotOnHub."""
    try:
        yield
    except (*_CLIENT, OSError) as error:
        if not isinstance(error, _CLIENT) and error.errno is not None:
            raise  # an error of the disk
        found = _innermost(error)
        kind = NotOnHub if _is_missing(found, writing) else HubError
        raise kind(_words(found, repository, revision, writing)) from error


def _innermost(error: BaseException) -> BaseException:
    """Return the error that the client wrapped in an error of its own, or error itself."""
    wrapped = isinstance(error, RevisionResolutionError | EntryNotFoundError | RuntimeError)
    cause = error.__cause__
    return _innermost(cause) if wrapped and isinstance(cause, _CLIENT) else error


def _is_missing(error: BaseException, writing: bool) -> bool:
    if isinstance(error, GatedRepoError):
        return False
    missing = (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError, RevisionResolutionError)
    return isinstance(error, missing) or (
        not writing and _status(error) == 401 and _BAD_TOKEN not in _server_message(error)
    )


def _words(error: BaseException, repository: str, revision: str | None, writing: bool) -> str:
    status, said = _status(error), _server_message(error)
    at = "" if revision is None else f" at revision {revision!r}"
    if isinstance(error, GatedRepoError):
        return (
            f"the hub shows {repository!r} only to users to whom its owner has given access: request access at "
            f"{constants.ENDPOINT}/{repository}, then {_LOG_IN}"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"the hub's {repository!r} must have the requested revision, got {revision!r}: check the name"
    if status == 401 and (writing or _BAD_TOKEN in said):
        return f"the hub must know who asks for {repository!r}, got no valid token ({said}): {_LOG_IN}"
    if _is_missing(error, writing):
        return (
            f"the hub has no {repository!r}{at}, or you may not read it: check the name; if it is private, "
            f"{_LOG_IN}, as a user who may read it"
        )
    if status == 403:
        return (
            f"the hub must let you write to {repository!r}, got 403 ({said}): use a token that may write there, or "
            "another name"
        )
    if status in (409, 412):
        return f"{repository!r} must not change while it is written to, got {status} ({said}): try again"
    if status is not None:
        return f"the hub must answer for {repository!r}{at}, got {status} ({said}): try again later"
    return (
        f"the connection to the hub for {repository!r}{at} broke off ({type(error).__name__}: {_first_line(error)}): "
        "nothing of it is used; try again"
    )


def _status(error: BaseException) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _server_message(error: BaseException) -> str:
    """Return the hub's own words."""
    said = getattr(error, "server_message", None)
    if isinstance(error, HfHubHTTPError):
        said = said or error.response.headers.get("X-Error-Message")
    return " ".join(str(said or _first_line(error)).split())[:200]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:200]
