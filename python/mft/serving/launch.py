"""Do mft serve: bind a port, load the base with its tasks' masks, start a thread that runs it, serve HTTP."""

import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mft.checks import check_rule, nearest_path
from mft.config import ModelConfig
from mft.evaluation.evaluated_base import learned_base
from mft.masks.bank import load_mask_bank
from mft.masks.location import masks_directory
from mft.models.next_tokens import longest_row
from mft.serving.api.api_keys import ApiKeys
from mft.serving.api.hosts import is_loopback, known_hosts
from mft.serving.api.service import Service
from mft.serving.batch.running_batch import RunningBatch
from mft.serving.batch.scheduler import Scheduler
from mft.serving.log import Log, new_log
from mft.serving.options import Options
from mft.serving.passing_thread import in_passing_thread
from mft.serving.port import bind
from mft.serving.reload import MasksFile, Reload
from mft.serving.server import Server
from mft.serving.tasks import Tasks
from mft.training.inputs import read_model
from mft.training.memory_plan import free_memory

_SHARE = 0.5  # of the free memory, for keys and values
_ROWS, _USUAL = 32, 512  # more rows take longer for each token; tokens of a usual request
_READING = 128  # connections in addition to those of running and waiting requests: idle ones and incomplete requests


def serve(
    masks: Mapping[str, str | Path],
    model_name: str | None = None,
    dtype: str | None = None,
    options: Options | None = None,
) -> None:
    """Answer until SIGINT or SIGTERM. Call it on the main thread.

    Args:
        masks: output_dirs of mft train, their masks/, or repositories of the hub, by the task's name.
        model_name, dtype: those of the base; by default, the base that the first masks were learned on.
    Raises: as load_mask_bank; OSError if the port is taken; ValueError that names an option; RuntimeError.
    """
    options = options or Options()
    log = new_log(options.log_format, options.log_level, options.log_zone)
    reload = Reload(log)
    with log.log_libraries(), reload.catching_hang_up():
        _serve(masks, (model_name, dtype), options, log, reload)


def row_length(asked: int | None, config: Any, name: str, cached: int) -> int:
    """Return asked, or by default the model's positions, at most the number of tokens that can be cached.

    Raises: ValueError for more than these, or if nothing limits positions.
    """
    longest = longest_row(config)
    if asked is None:
        if longest is None:
            raise ValueError(f"--length must be given, because {name!r} has no limit on positions, got none")
        return min(longest, cached)
    if longest is not None and asked > longest:
        raise ValueError(f"--length must be at most {longest}, as many positions as {name!r} has, got {asked}")
    if asked > cached:
        raise ValueError(f"--length must be at most {cached}, as many tokens as --cache holds, got {asked}")
    return asked


def _base_of(directories: Mapping[str, Path], model_name: str | None, dtype: str | None) -> tuple[ModelConfig, str]:
    """Return (the base, a line that says where it was found). By default it is the base of the first masks."""
    if directories:
        return learned_base(next(iter(directories.values())), model_name, dtype)
    if model_name is None:
        raise ValueError("--model must name the base if no masks are given, got none")
    config = ModelConfig(name=model_name) if dtype is None else ModelConfig(name=model_name, dtype=dtype)
    return config, f"base {config.name} in {config.dtype}, and no masks yet"


def _serve(
    masks: Mapping[str, str | Path], given: tuple[str | None, str | None], options: Options, log: Log, reload: Reload
) -> None:
    """Serve masks on the base of the given name and dtype."""
    keys, masks_file = _keys(options, log), None
    if options.masks_file is not None:
        masks_file = MasksFile(options.masks_file)
        twice = next((task for task in masks_file.loaded if task in masks), None)
        check_rule(twice is None, "--masks-file", "name no task of --masks", repr(twice))
        masks = {**masks, **masks_file.loaded}
    directories = {task: masks_directory(place) for task, place in masks.items()}
    config, words = _base_of(directories, *given)
    base = _public_name(config.name)
    check_rule(base not in masks, "--masks", "name tasks differently from the base", base)
    with bind(options.host, options.port) as bound:
        log.tell("loading", words)
        batch, tokenizer = in_passing_thread(lambda: _load(config, directories, options))
        most = row_length(options.length, batch.bank.model.config, config.name, batch.slabs.longest)
        rows = options.rows or max(1, min(_ROWS, batch.slabs.longest // _USUAL))
        log.tell("cache", f"keys and values of {batch.slabs.longest} tokens in memory, for up to {rows} rows of {most}")
        scheduler = Scheduler(batch, rows=rows, waiting=options.waiting, timeout=options.timeout)
        tasks = Tasks(batch.bank, scheduler, base, force=options.force)
        hosts = known_hosts(bound.getsockname()[0], options.host, options.allow_host)
        if keys is None and not is_loopback(bound.getsockname()[0]):
            words = (
                f"--host {options.host} lets everyone who reaches it send requests, got no --api-keys-file: give one"
            )
            log.tell("warning", words, level=logging.WARNING)
        service = Service(
            tasks,
            tokenizer,
            scheduler,
            length=most,
            max_tokens=options.max_tokens,
            log=log,
            hosts=hosts,
            keys=keys,
            load_from=options.load_from,
        )
        host = f"[{options.host}]" if ":" in options.host else options.host
        address = f"http://{host}:{bound.getsockname()[1]}"

        def ready() -> None:
            reload.begin(tasks, keys, masks_file)
            log.tell("ready", f"serving {', '.join(tasks.names)} on {address}/v1", address=address)

        server = Server(
            service.app,
            scheduler,
            grace=options.grace,
            connections=rows + options.waiting + _READING,
            ready=ready,
        )
        server.run_until_signal([bound])
    if scheduler.has_failed:
        raise RuntimeError("the thread that runs the model must not fail, and it did: see the traceback above")
    log.tell("stopped", "stopped")


def _load(config: ModelConfig, directories: Mapping[str, Path], options: Options) -> tuple[RunningBatch, Any]:
    """Return the batch of the base with its masks, and the tokenizer."""
    model, tokenizer = read_model(config)
    bank = load_mask_bank(model, directories, force=options.force)
    batch = RunningBatch(bank, options.cache or int(free_memory(model.device)[0] * _SHARE))
    batch.check_rows_apart()
    return batch, tokenizer


def _keys(options: Options, log: Log) -> ApiKeys | None:
    """Return the keys that the options name, None without any. Warn if clients may load masks and should not."""
    warn = functools.partial(log.tell, "warning", level=logging.WARNING)
    root = options.load_from
    if root is not None:
        check_rule(root.is_dir(), "--load-from", "name a directory", f"{root}{nearest_path(root)}")
    users, admins = options.api_keys_file, options.admin_keys_file
    keys = None if users is None and admins is None else ApiKeys(users, warn, admins)
    if root is not None and keys is None:
        warn(f"--load-from lets every client load and unload masks, got {root} without --api-keys-file: give one")
    elif root is not None and admins is None:
        warn(f"--load-from lets only keys of --admin-keys-file load and unload masks, got {root} without it: give one")
    return keys


def _public_name(base: str) -> str:
    """Return the base's name for clients: of a path only the last part, since the rest is private."""
    path = Path(base).expanduser()
    return (path.resolve().name or "base") if path.exists() else base
