"""The Python client: load a vLLM LLM with masks, and switch its task."""

import os
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from mft.vllm.empty_loras import EAGER, Adapters
from mft.vllm.remote import change_server
from mft.vllm.versions import NAME, PER_REQUEST_BACKEND, check_vllm
from mft.vllm.worker_errors import call_while_alive, unmark_errors

_ADAPTERS: WeakKeyDictionary[Any, Adapters] = WeakKeyDictionary()  # by LLM with masks per request


def load(
    base: str | os.PathLike,
    tasks: Mapping[str, str | os.PathLike],
    *,
    force: bool = False,
    per_request: bool = False,
    **options: Any,
) -> Any:
    """Return a vllm.LLM of a base with the masks of tasks. At first it answers as the base.

    Args:
        base: an ordinary model, as vLLM takes it.
        tasks, force: as the arguments directories and force of mft.load_mask_bank.
        per_request: experimental. The weights stay the base's, and each request names its task, see request_of.
        options: further arguments of vllm.LLM.
    Raises: RuntimeError if vLLM is not installed or has another version; ValueError as add_tasks.
    """
    check_vllm()
    for key in options:
        if key in ("quantization", "weight_transfer_config") or "lora" in key:
            raise ValueError(f"{key} must be left out, because mft sets it for masks in vLLM, got {options[key]!r}")
    adapters = Adapters(tasks) if per_request else None
    if adapters:
        if not options.setdefault("enforce_eager", True):
            raise ValueError(f"enforce_eager must be {EAGER}, got False: leave it out")
        options |= adapters.options
    from vllm import LLM

    backend = PER_REQUEST_BACKEND if adapters else NAME
    llm = LLM(model=str(base), quantization=NAME, weight_transfer_config={"backend": backend}, **options)
    if adapters:
        _ADAPTERS[llm] = adapters
        for task in tasks:
            llm.llm_engine.add_lora(adapters.request(task))
    _add(llm, tasks, force, {"loras": adapters.ids} if adapters else {})
    return llm


def add_tasks(llm: Any, tasks: Mapping[str, str | os.PathLike], *, force: bool = False) -> None:
    """Add the masks of more tasks; the weights stay. Raises: ValueError for bad masks, and no task is added."""
    _add(llm, tasks, force, {})


def request_of(llm: Any, task: str | None) -> Any:
    """Return what llm.generate takes as lora_request, to answer with the masks of this task; None: as the base.

    Args: llm: of load with per_request. Raises: ValueError for an unknown task, or another llm.
    """
    if llm not in _ADAPTERS:
        raise ValueError(
            f"llm must be of mft.vllm.load(..., per_request=True), got {llm!r}: load it so, or use(llm, task)"
        )
    return None if task is None else _ADAPTERS[llm].request(task)


def use(llm: Any, task: str | None, *, api_key: str | None = None) -> None:
    """Make llm answer with the masks of this task, or as the base if task is None.

    Args: llm: what load returned, or the address of a server (python -m mft.vllm). api_key: an admin's, for a server.
    Raises: ValueError for an unknown task, or while llm answers; RuntimeError if the engine is dead.
    """
    change(llm, {"task": task}, api_key)


def change(llm: Any, update: dict[str, Any], api_key: str | None = None) -> None:
    """Send one update to the engine and empty its prefix cache, so that no answer uses the cache of other weights."""
    if isinstance(llm, str):
        change_server(llm, update, api_key)
        return
    engine = llm.llm_engine
    if engine.has_unfinished_requests():
        raise ValueError("llm must have answered all requests before its masks change: wait for them")
    resources = getattr(engine.engine_core, "resources", None)  # None if the engine has no process of its own
    with unmark_errors():
        call_while_alive(lambda: _switch(llm, update), lambda: resources is not None and resources.engine_dead)


def _add(llm: Any, tasks: Mapping[str, str | os.PathLike], force: bool, more: dict[str, Any]) -> None:
    places = {task: str(place) for task, place in tasks.items()}
    with unmark_errors():
        llm.init_weight_transfer_engine({"init_info": {"tasks": places, "force": force} | more})


def _switch(llm: Any, update: dict[str, Any]) -> None:
    llm.start_weight_update()
    llm.update_weights({"update_info": update})
    llm.finish_weight_update(update["task"] or "base")
    if not llm.reset_prefix_cache():
        raise RuntimeError("vLLM must empty its prefix cache after a switch, and did not: make a new LLM")
