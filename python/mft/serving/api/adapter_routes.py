"""vLLM's routes for adapters, by which clients load and unload masks while the service runs."""

import logging
import os
import time
from pathlib import Path
from typing import ClassVar

from pydantic import Field
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from mft.checks import nearest_path
from mft.masks.export_format import CONFIG_FILE, MASK_FILE
from mft.masks.location import masks_directory
from mft.serving.api.body import Keys, read_body
from mft.serving.api.exchange import exchange_of
from mft.serving.api.incoming import json_bytes
from mft.serving.log import Log
from mft.serving.refusal import Refused
from mft.serving.tasks import Tasks

MOST_TASKS = 256  # that clients may load, with those that the server has from its own options
_MOST_BYTES = 1 << 14  # of a body, which has a name and a path


class LoadBody(Keys):
    """POST /v1/load_lora_adapter. load_inplace: replace the masks of a name that is taken."""

    lora_name: str = Field(max_length=256)
    lora_path: str = Field(min_length=1, max_length=4096)
    load_inplace: bool = False


class UnloadBody(Keys):
    """POST /v1/unload_lora_adapter"""

    ignored: ClassVar[tuple[str, ...]] = ("lora_int_id",)

    lora_name: str = Field(max_length=256)


class Adapters:
    """The routes. root: the directory below which clients may load masks; None: clients may change nothing."""

    def __init__(self, tasks: Tasks, root: Path | None, log: Log) -> None:
        self._tasks, self._root, self._log = tasks, None if root is None else root.resolve(), log

    async def load(self, request: Request) -> Response:
        root = self._allowed_root(request)
        body = read_body(LoadBody, await json_bytes(request, _MOST_BYTES))
        directory, began = directory_below(root, body.lora_path), time.monotonic()
        try:
            await self._tasks.load(body.lora_name, directory, replace=body.load_inplace, most=MOST_TASKS)
        except (ValueError, RuntimeError, OSError) as error:  # errors that the client can fix
            missing = isinstance(error, FileNotFoundError)
            param = "lora_name" if str(error).startswith("lora_name ") else "lora_path"
            raise Refused(str(error), status=404 if missing else 400, param=param) from error
        return self._respond(request, "loaded", body.lora_name, time.monotonic() - began, f" from {directory}")

    async def unload(self, request: Request) -> Response:
        self._allowed_root(request)
        body, began = read_body(UnloadBody, await json_bytes(request, _MOST_BYTES)), time.monotonic()
        await self._tasks.unload(body.lora_name)
        return self._respond(request, "unloaded", body.lora_name, time.monotonic() - began)

    def _allowed_root(self, request: Request) -> Path:
        if self._root is None:
            raise Refused(
                "loading and unloading must be switched on at the server, got a server without it: start it with "
                "--load-from DIRECTORY",
                status=403,
                code="loading_is_off",
            )
        exchange_of(request.scope).key.check_admin()
        return self._root

    def _respond(self, request: Request, event: str, name: str, seconds: float, beside: str = "") -> Response:
        exchange = exchange_of(request.scope)
        self._log.tell(
            event,
            f"{exchange.id}{exchange.key.mark} {event} {name}{beside} in {seconds:.2f} s",
            level=logging.INFO,
            request_id=exchange.id,
            key=exchange.key.name or None,
            model=name,
            seconds=round(seconds, 4),
        )
        return PlainTextResponse(f"Success: {name} is {event}.")


def directory_below(root: Path, path: str) -> Path:
    """Return a client's path with links followed. Raises: Refused if it or a file of masks there leads out of root."""
    try:
        found = _real(root / path)
        masks = masks_directory(found)  # for a run, its directory of masks, which may be a link
        files = [_real(masks / name) for name in (CONFIG_FILE, MASK_FILE)]
    except (ValueError, OSError):  # a null byte, too long a name
        found, files = root, []
    if found == root or not all(each.is_relative_to(root) for each in (found, *files)):
        raise Refused(
            f"lora_path must be a directory below {root} (--load-from), as must its files, got {path[:200]!r}",
            param="lora_path",
        )
    if not found.is_dir():
        raise Refused(
            f"lora_path must be a directory, got {path[:200]!r}{nearest_path(found)}", status=404, param="lora_path"
        )
    return found


def _real(path: Path) -> Path:
    """Return a path with its links followed, as far as they lead: a circle of links leads nowhere."""
    return Path(os.path.realpath(path))
