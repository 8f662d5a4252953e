"""What mft serve does, in order: a port, the base with its tasks' masks, a thread that runs it, the HTTP service."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from mft.checks import check_rule
from mft.evaluation.evaluated_base import learned_base
from mft.masks.bank import load_mask_bank
from mft.masks.location import masks_directory
from mft.serving.hosts import known_hosts
from mft.serving.length import row_length
from mft.serving.port import bind
from mft.serving.running_batch import RunningBatch
from mft.serving.scheduler import Scheduler
from mft.serving.server import Server
from mft.serving.service import Service
from mft.tracking.console import say
from mft.training.inputs import read_model

_READING = 128  # connections beside those of requests that are answered or wait, such as idle ones and half requests


def serve(
    masks: Mapping[str, str | Path],
    model_name: str | None = None,
    dtype: str | None = None,
    *,
    force: bool = False,
    host: str = "127.0.0.1",
    port: int = 8000,
    allowed_hosts: Sequence[str] = (),
    rows: int = 8,
    waiting: int = 64,
    length: int | None = None,
    grace: float = 30,
) -> None:
    """Answer until SIGINT or SIGTERM. Call it on the main thread.

    Args:
        masks: output_dirs of mft train, their masks/, or repositories of the hub, by the task's name.
        model_name, dtype: of the base; by default the one that the first masks were learned on.
        port: 0 for a free one.
        allowed_hosts: names by which clients may ask a service on loopback, besides loopback's own.
        rows, waiting: requests that are answered at once, and that may wait beside them.
        length: tokens of a prompt with its answer; by default as many as the base has positions for.
        grace: seconds that what is being answered gets when the service is to stop.
    Raises: as load_mask_bank; OSError if the port is taken; RuntimeError if the thread that runs the model failed.
    """
    directories = {task: masks_directory(place) for task, place in masks.items()}
    config, words = learned_base(next(iter(directories.values())), model_name, dtype)
    base = _shown_name(config.name)
    check_rule(base not in masks, "--masks", "name tasks otherwise than the base", base)
    with bind(host, port) as bound:
        say(words)
        model, tokenizer = read_model(config)
        most = row_length(length, model.config, config.name)
        bank = load_mask_bank(model, directories, force=force)
        batch = RunningBatch(bank)
        batch.check_rows_apart()
        scheduler = Scheduler(batch, rows=rows, waiting=waiting)
        service = Service(
            bank,
            tokenizer,
            scheduler,
            base=base,
            length=most,
            hosts=known_hosts(bound.getsockname()[0], host, allowed_hosts),
            log=lambda line: say(f"{datetime.now():%Y-%m-%d %H:%M:%S} {line}"),
        )
        names = ", ".join((base, *bank.tasks))
        address = f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}"
        server = Server(
            service.app,
            scheduler,
            grace=grace,
            connections=rows + waiting + _READING,
            ready=lambda: say(f"serving {names} on {address}/v1"),
        )
        server.run_until_signal([bound])
    if scheduler.has_failed:
        raise RuntimeError("the thread that runs the model must not fail, and it did: the traceback stands above")
    say("stopped")


def _shown_name(base: str) -> str:
    """What clients call it: of a directory or a file its own name, as the others on its path are none of theirs."""
    path = Path(base).expanduser()
    return (path.resolve().name or "base") if path.exists() else base
