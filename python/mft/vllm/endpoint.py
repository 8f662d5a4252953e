"""The routes /v1/mft of a vLLM server: list the tasks, and switch between requests.

A switch waits until running requests have ended with the old task. Requests that arrive meanwhile wait for the new one.
"""

import asyncio
import json
import logging
import time
from argparse import Namespace
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocketClose
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest

from mft.checks import shown
from mft.serving.api.api_keys import ApiKeys, check_key
from mft.serving.api.exchange import Exchange, Exchanges, exchange_of
from mft.serving.api.hosts import check_host, known_hosts
from mft.serving.api.incoming import json_bytes
from mft.serving.refusal import Refused
from mft.vllm.versions import NAME
from mft.vllm.worker_errors import DEAD, PER_REQUEST, SECONDS, check_known, unmark_errors

logger = logging.getLogger("uvicorn.error")  # the one that vLLM shows
Answer = TypeVar("Answer")
WITHOUT_KEY = ("/health", "/metrics", "/ping", "/version")
KEYS = {"use": {"task"}, "update": {"task", "flips"}}
# An update has at most 1 bit per weight, in base64: 1 GiB is enough for 6.4 billion weights with any mask.
MOST_BYTES = {"use": 1 << 14, "update": 1 << 30}


class MaskEndpoint:
    """A plugin of vllm.endpoint_plugins. The tasks are mft_tasks in the server's arguments."""

    name = NAME
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._engine: Any = None
        self._tasks: list[str] = []
        self._task: str | None = None
        self._per_request = False
        self._hosts: frozenset[str] | None = frozenset()
        self._origins: list[str] = []
        self._switching = asyncio.Lock()
        self._app: Any = None
        self._keys: ApiKeys | None = None

    def attach_router(self, app: Starlette) -> None:
        self._app = app
        app.add_route("/v1/mft/tasks", self.tasks, methods=["GET"])
        app.add_route("/v1/mft/use", self.use, methods=["POST"])
        app.add_route("/v1/mft/update", self.update, methods=["POST"])

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        tasks = getattr(args, "mft_tasks", {})
        self._engine, host = engine_client, getattr(args, "host", None) or ""
        self._hosts, self._origins = known_hosts(host, host, ()), getattr(args, "allowed_origins", [])
        if not tasks:  # a server that was not started by mft.vllm.serve
            return
        self._keys = getattr(args, "mft_keys", None)
        if self._keys is not None:
            self._app.add_middleware(_Guard, record=_log, checks=[self._check_key])
        info = {"tasks": tasks, "force": getattr(args, "mft_force", False)}
        self._per_request = getattr(args, "mft_per_request", False)
        if self._per_request:
            requests = state.openai_serving_models.lora_requests
            info["loras"] = {task: requests[task].lora_int_id for task in tasks}
        with unmark_errors():
            await engine_client.init_weight_transfer_engine(WeightTransferInitRequest(info))
        self._tasks = list(tasks)

    async def tasks(self, _: Request) -> JSONResponse:
        return JSONResponse({"tasks": self._tasks, "task": self._task})

    async def use(self, request: Request) -> JSONResponse:
        return await self._answer(request, "use")

    async def update(self, request: Request) -> JSONResponse:
        return await self._answer(request, "update")

    # ------------------------------------------------------------------------------------------ private

    async def _answer(self, request: Request, route: str) -> JSONResponse:
        try:
            self._check_sender(request)
            self._check_admin(request)
            body = await json_bytes(request, MOST_BYTES[route])
            if self._per_request:  # not before: a client that is still sending would not read a refusal
                raise ValueError(PER_REQUEST)
            update = _read(body, route)
            if route == "use" and update["task"] is not None:
                check_known(update["task"], self._tasks, ", or null for the base")
            async with self._switching:
                waited, switched = await self._await_while_alive(self._change(update))
        except Refused as refused:
            return _refusal(refused.status, refused)
        except ValueError as error:
            return _refusal(400, error)
        except RuntimeError as error:
            return _refusal(503, error)
        return JSONResponse({"task": update["task"], "waited_seconds": waited, "switch_seconds": switched})

    def _check_sender(self, request: Request) -> None:
        """Refuse web pages. By default vLLM lets those of all sites send JSON (CORS); a browser adds their Origin."""
        check_host(request.scope, self._hosts)
        origin = request.headers.get("origin")
        if origin is not None and origin not in self._origins:
            raise Refused(
                f"Origin must be one that --allowed-origins names, or left out by a program, got {shown(origin)}",
                status=403,
            )

    def _check_key(self, scope: Scope) -> None:
        """Refuse a request without a valid key, on routes of vLLM that its --api-key leaves open too."""
        if scope["method"] != "OPTIONS" and scope["path"] not in WITHOUT_KEY:
            check_key({**scope, "path": "/v1"}, self._keys)  # which looks at the keys below /v1

    def _check_admin(self, request: Request) -> None:
        if self._keys is not None and not (key := exchange_of(request.scope).key).is_admin:
            raise Refused(
                f"a switch must be asked for with a key of --admin-keys-file, got {key.name!r} of --api-keys-file: "
                "send an admin's key; if there is none, start the server with --admin-keys-file FILE",
                status=403,
            )

    async def _await_while_alive(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        """Return the result of work. Raises: RuntimeError if the engine dies meanwhile."""
        task = asyncio.ensure_future(work)
        while not (await asyncio.wait({task}, timeout=SECONDS))[0]:
            if self._engine.errored:
                task.cancel()
                await asyncio.wait({task})
                raise RuntimeError(DEAD)
        return await task

    async def _change(self, update: dict[str, Any]) -> tuple[float, float]:
        """Change the masks, and return the seconds until running answers had ended and those of the switch itself."""
        begin = time.perf_counter()
        with unmark_errors():
            await self._engine.pause_generation(mode="wait", clear_cache=True)
            paused = time.perf_counter()
            try:
                await self._engine.start_weight_update()
                await self._engine.update_weights(WeightTransferUpdateRequest(update))
                if "flips" not in update:  # at once: what follows may fail, and the weights are the task's
                    self._task = update["task"]
                elif update["task"] not in self._tasks:
                    self._tasks.append(update["task"])
                await self._engine.finish_weight_update(update["task"] or "base")
                if not await self._engine.reset_prefix_cache():
                    raise RuntimeError("vLLM must empty its prefix cache after a switch, and did not: restart it")
            finally:
                await self._engine.resume_generation()
        return round(paused - begin, 4), round(time.perf_counter() - paused, 4)


class _Guard(Exchanges):
    """Exchanges that let no websocket pass, whose key nothing here checks."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (WebSocketClose() if scope["type"] == "websocket" else super().__call__)(scope, receive, send)


def _log(exchange: Exchange, status: int) -> None:
    logger.info("%s%s %s %s %d", exchange.id, exchange.key.mark, exchange.method, exchange.path, status)


def _read(body: bytes, route: str) -> dict[str, Any]:
    keys = KEYS[route]
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or values.keys() != keys:
        raise ValueError(f"body must be a JSON object with {' and '.join(sorted(keys))}, got {body[:100]!r}")
    if route == "update" and not (isinstance(values["task"], str) and isinstance(values["flips"], dict)):
        raise ValueError(f"task must be a name, and flips what mft.vllm.MaskStream sends, got {body[:100]!r}")
    return values


def _refusal(status: int, error: Exception) -> JSONResponse:
    """Return the error in the form of OpenAI's error object."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": str(error), "type": kind, "code": status}}, status)
