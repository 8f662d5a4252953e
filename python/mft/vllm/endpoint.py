"""The routes /v1/mft of a vLLM server: list the tasks, and switch between requests.

A switch waits until running requests have ended with the old task. Requests that arrive meanwhile wait for the new one.
"""

import asyncio
import json
import time
from argparse import Namespace
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest

from mft.vllm.failures import DEAD, PER_REQUEST, SECONDS, check_known, unmarked
from mft.vllm.versions import NAME

Answer = TypeVar("Answer")
KEYS = {"use": {"task"}, "update": {"task", "flips"}}


class MaskEndpoint:
    """A plugin of vllm.endpoint_plugins. The tasks are mft_tasks in the server's arguments."""

    name = NAME
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._engine: Any = None
        self._tasks: list[str] = []
        self._task: str | None = None
        self._per_request = False
        self._switching = asyncio.Lock()

    def attach_router(self, app: FastAPI) -> None:
        app.add_api_route("/v1/mft/tasks", self.tasks, methods=["GET"])
        app.add_api_route("/v1/mft/use", self.use, methods=["POST"])
        app.add_api_route("/v1/mft/update", self.update, methods=["POST"])

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        tasks = getattr(args, "mft_tasks", {})
        self._engine = engine_client
        if not tasks:  # a server that was not started by mft.vllm.serve
            return
        info = {"tasks": tasks, "force": getattr(args, "mft_force", False)}
        self._per_request = getattr(args, "mft_per_request", False)
        if self._per_request:
            requests = state.openai_serving_models.lora_requests
            info["loras"] = {task: requests[task].lora_int_id for task in tasks}
        with unmarked():
            await engine_client.init_weight_transfer_engine(WeightTransferInitRequest(info))
        self._tasks = list(tasks)

    async def tasks(self) -> JSONResponse:
        return JSONResponse({"tasks": self._tasks, "task": self._task})

    async def use(self, request: Request) -> JSONResponse:
        return await self._answer(request, "use")

    async def update(self, request: Request) -> JSONResponse:
        return await self._answer(request, "update")

    # ------------------------------------------------------------------------------------------ private

    async def _answer(self, request: Request, route: str) -> JSONResponse:
        try:
            body = await request.body()  # first: a client that is still sending would not read a refusal
            if self._per_request:
                raise ValueError(PER_REQUEST)
            update = _read(body, route)
            if route == "use" and update["task"] is not None:
                check_known(update["task"], self._tasks, ", or null for the base")
            async with self._switching:
                waited, switched = await self._while_alive(self._change(update))
        except ValueError as error:
            return _refusal(400, error)
        except RuntimeError as error:
            return _refusal(503, error)
        return JSONResponse({"task": update["task"], "waited_seconds": waited, "switch_seconds": switched})

    async def _while_alive(self, work: Coroutine[Any, Any, Answer]) -> Answer:
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
        with unmarked():
            await self._engine.pause_generation(mode="wait", clear_cache=True)
            paused = time.perf_counter()
            try:
                await self._engine.start_weight_update()
                await self._engine.update_weights(WeightTransferUpdateRequest(update))
                await self._engine.finish_weight_update(update["task"] or "base")
                if not await self._engine.reset_prefix_cache():
                    raise RuntimeError("vLLM must empty its prefix cache after a switch, and did not: restart it")
            finally:
                await self._engine.resume_generation()
        if update.get("flips") is None:
            self._task = update["task"]
        elif update["task"] not in self._tasks:
            self._tasks.append(update["task"])
        return round(paused - begin, 4), round(time.perf_counter() - paused, 4)


def _read(body: bytes, route: str) -> dict[str, Any]:
    keys = KEYS[route]
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or values.keys() != keys:
        raise ValueError(f"body must be a JSON object with {' and '.join(sorted(keys))}, got {body[:100]!r}")
    return values


def _refusal(status: int, error: Exception) -> JSONResponse:
    """Return the error in the form of OpenAI's error object."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": str(error), "type": kind, "code": status}}, status)
