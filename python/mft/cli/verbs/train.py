"""The verbs of "Train": train, finetune, schema.

`mft --help` imports this file and should not wait for transformers: each verb imports its modules itself.
"""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from mft.checks import check_one_of
from mft.cli.keys import FinetuneKeys, ListedKeys, run_schema
from mft.cli.options import TRAIN, Config, Force, Overrides, Overwrite, Resume, Set, given_overrides
from mft.cli.studies import study_function
from mft.cli.waiting_threads import let_waiting_threads_sleep
from mft.config_file import load_config
from mft.tracking.console import say

verbs = typer.Typer()


@verbs.command(cls=ListedKeys, rich_help_panel=TRAIN)
def train(
    config: Config = None,
    overrides: Overrides = None,
    sets: Set = None,
    overwrite: Overwrite = False,
    resume: Resume = None,
    force: Force = False,
    merge: Annotated[
        Path | None,
        typer.Option(help="At the end, also merge the masks, like mft merge: write an ordinary model there."),
    ] = None,
) -> None:
    """Fine-tune masks over frozen weights, and write them to output_dir/masks."""
    start = _start(config, overrides, sets, overwrite=overwrite, resume=resume, force=force)
    from mft.cli.masks import check_merged, run_merge
    from mft.training.run_directory import next_steps
    from mft.training.training_run import run_train

    if merge is not None:
        check_merged("--merge", merge)  # before it trains for hours
    masks = run_train(start)
    if os.environ.get("RANK", "0") != "0":  # of torchrun's processes, only the first one continues
        return
    if merge is not None:
        run_merge(str(masks), merge, None, None, force=False)
    for line in ("next:", *next_steps(masks.parent)):
        say(line)


@verbs.command(cls=FinetuneKeys, rich_help_panel=TRAIN)
def finetune(
    config: Config = None,
    overrides: Overrides = None,
    sets: Set = None,
    overwrite: Overwrite = False,
    resume: Resume = None,
    force: Force = False,
) -> None:
    """Fine-tune all weights, and write an ordinary model to output_dir/model."""
    start = _start(config, overrides, sets, overwrite=overwrite, resume=resume, force=force, of_weights=True)
    from mft.training.training_run import run_finetune

    run_finetune(start)


@verbs.command(rich_help_panel=TRAIN)
def schema(what: Annotated[str, typer.Argument(help="run, or study: what mft compare reads.")] = "run") -> None:
    """Print a JSON Schema, with which editors complete and check the YAML files."""
    check_one_of("what", what, ("run", "study"))
    written = run_schema() if what == "run" else study_function("schema")()
    typer.echo(json.dumps(written, indent=2))


def _start(
    config: Path | None,
    overrides: list[str] | None,
    sets: list[str] | None,
    *,
    overwrite: bool,
    resume: Path | None,
    force: bool,
    of_weights: bool = False,
) -> Any:
    """Return how a run of finetune or train begins: new, or resumed. Loads torch after it has checked the keys."""
    given = given_overrides(overrides, sets)
    if resume is None:
        if force:
            raise ValueError("--force must come with --resume, got it alone")
        run_config = load_config(config, given, of_weights=of_weights)
    elif overwrite:
        raise ValueError("--overwrite must not come with --resume: one deletes the run, the other goes on with it")
    let_waiting_threads_sleep()
    from mft.training.resume import Begin, Resume

    if resume is None:
        return Begin(run_config, overwrite=overwrite)
    return Resume(resume, config, given, force=force)
