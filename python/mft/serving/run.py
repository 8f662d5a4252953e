"""What mft serve does, in order: a port, the base with its tasks' masks, a thread that runs it, the HTTP service."""

import functools
from collections.abc import Mapping
from pathlib import Path

from mft.checks import check_rule
from mft.evaluation.evaluated_base import learned_base
from mft.masks.bank import load_mask_bank
from mft.masks.location import masks_directory
from mft.serving.hosts import known_hosts
from mft.serving.journal import Journal
from mft.serving.length import row_length
from mft.serving.log import Log, new_log
from mft.serving.options import Options
from mft.serving.port import bind
from mft.serving.running_batch import RunningBatch
from mft.serving.scheduler import Scheduler
from mft.serving.server import Server
from mft.serving.service import Service
from mft.training.inputs import read_model

_READING = 128  # connections beside those of requests that are answered or wait, such as idle ones and half requests


def serve(
    masks: Mapping[str, str | Path],
    model_name: str | None = None,
    dtype: str | None = None,
    options: Options | None = None,
) -> None:
    """Answer until SIGINT or SIGTERM. Call it on the main thread.

    Args:
        masks: output_dirs of mft train, their masks/, or repositories of the hub, by the task's name.
        model_name, dtype: of the base; by default the one that the first masks were learned on.
    Raises: as load_mask_bank; OSError if the port is taken; ValueError that names an option; RuntimeError if the thread
        that runs the model failed.
    """
    options = options or Options()
    log = new_log(options.log_format, options.log_level, options.log_zone)
    with log.with_libraries():
        _serve(masks, model_name, dtype, options, log)


def _serve(
    masks: Mapping[str, str | Path], model_name: str | None, dtype: str | None, options: Options, log: Log
) -> None:
    directories = {task: masks_directory(place) for task, place in masks.items()}
    config, words = learned_base(next(iter(directories.values())), model_name, dtype)
    base = _shown_name(config.name)
    check_rule(base not in masks, "--masks", "name tasks otherwise than the base", base)
    with bind(options.host, options.port) as bound:
        log.tell("loading", words)
        model, tokenizer = read_model(config)
        most = row_length(options.length, model.config, config.name)
        bank = load_mask_bank(model, directories, force=options.force)
        batch = RunningBatch(bank)
        batch.check_rows_apart()
        scheduler = Scheduler(batch, rows=options.rows, waiting=options.waiting, timeout=options.timeout)
        service = Service(
            bank,
            tokenizer,
            scheduler,
            base=base,
            length=most,
            max_tokens=options.max_tokens,
            hosts=known_hosts(bound.getsockname()[0], options.host, options.allow_host),
            journal=Journal(log),
        )
        names = ", ".join((base, *bank.tasks))
        address = f"http://{_in_address(options.host)}:{bound.getsockname()[1]}"
        server = Server(
            service.app,
            scheduler,
            grace=options.grace,
            connections=options.rows + options.waiting + _READING,
            ready=functools.partial(log.tell, "ready", f"serving {names} on {address}/v1", address=address),
        )
        server.run_until_signal([bound])
    if scheduler.has_failed:
        raise RuntimeError("the thread that runs the model must not fail, and it did: the traceback stands above")
    log.tell("stopped", "stopped")


def _in_address(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _shown_name(base: str) -> str:
    """What clients call it: of a directory or a file its own name, as the others on its path are none of theirs."""
    path = Path(base).expanduser()
    return (path.resolve().name or "base") if path.exists() else base
