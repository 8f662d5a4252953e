"""The verbs of "Inspect": evaluate, inspect, verify.

`mft --help` imports this file and should not wait for transformers: each verb imports its modules itself.
"""

from pathlib import Path
from typing import Annotated

import typer

from mft.cli.keys import Keyed
from mft.cli.options import INSPECT, AnyBase, BaseDtype, BaseModel, Config, Masks, Overrides, Set, given_overrides
from mft.config_file import load_config

verbs = typer.Typer()


@verbs.command(cls=Keyed, rich_help_panel=INSPECT)
def evaluate(
    config: Config = None,
    overrides: Overrides = None,
    sets: Set = None,
    masks: Annotated[
        list[str] | None,
        typer.Option(help="Masks to put on the model, as for mft merge; repeatable: each is evaluated."),
    ] = None,
    split: Annotated[str, typer.Option(help="validation or test: the held-out split.")] = "validation",
    answers: Annotated[
        int,
        typer.Option(min=0, help="Maximum number of held-out answers that are generated and compared with the data."),
    ] = 100,
    lm_eval: Annotated[
        str | None, typer.Option("--lm-eval", help="Tasks of lm-eval instead, such as gsm8k,humaneval.")
    ] = None,
    lm_eval_tasks: Annotated[
        Path | None, typer.Option("--lm-eval-tasks", help="A directory of your own task files.")
    ] = None,
    run_task_code: Annotated[
        bool, typer.Option("--run-task-code", help="Let the files of --lm-eval-tasks run code on this machine.")
    ] = False,
    limit: Annotated[int | None, typer.Option(help="Use at most this many documents of each task.")] = None,
    run_generated_code: Annotated[
        bool, typer.Option("--run-generated-code", help="Let tasks run the model's code on this machine.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Write the tasks' scores to this file, as JSON.")] = None,
    force: AnyBase = False,
    unquantized: Annotated[
        bool, typer.Option("--unquantized", help="Use exact weights even if the masks were learned on quantised ones.")
    ] = False,
) -> None:
    """Measure loss, accuracy and exact answers on held-out data, or run lm-eval.

    With --masks, the model is measured with and without them. Without --config, masks are evaluated on the base and the
    data of their run. Overrides take precedence.
    """
    given = given_overrides(overrides, sets)
    run_config = None if config is None and masks else load_config(config, given)
    from mft.cli.evaluate import masks_config, run_evaluate, run_lm_eval
    from mft.masks.location import masks_directory

    directories = {name: masks_directory(name) for name in masks or ()}
    if run_config is None:
        run_config = masks_config(next(iter(directories.values())), given)
    if run_task_code and lm_eval_tasks is None:
        raise ValueError("--run-task-code must come with --lm-eval-tasks, got it alone")
    if lm_eval is not None:
        run_lm_eval(
            run_config,
            directories,
            [name.strip() for name in lm_eval.split(",")],
            tasks_dir=lm_eval_tasks,
            run_task_code=run_task_code,
            limit=limit,
            run_code=run_generated_code,
            output=output,
            force=force,
            unquantized=unquantized,
        )
        return
    for option, value in (("--lm-eval-tasks", lm_eval_tasks), ("--limit", limit), ("--output", output)):
        if value is not None:
            raise ValueError(f"{option} must come with --lm-eval, got {value} alone")
    run_evaluate(run_config, directories, split, answers=answers, force=force, unquantized=unquantized)


@verbs.command(rich_help_panel=INSPECT)
def inspect(
    masks: Masks,
    model: BaseModel = None,
    dtype: BaseDtype = None,
    force: AnyBase = False,
    every_row: Annotated[bool, typer.Option("--all", help="One row per masked layer, not per kind of layer.")] = False,
) -> None:
    """Show how many weights masks keep, and how they differ from the magnitude mask."""
    from mft.cli.masks import run_inspect

    run_inspect(masks, model, dtype, force=force, every_row=every_row)


@verbs.command(rich_help_panel=INSPECT)
def verify(
    directory: Annotated[
        str, typer.Argument(help="An output_dir, its masks/, one of its checkpoints, or user/repo[@revision].")
    ],
    model: BaseModel = None,
    dtype: BaseDtype = None,
    base: Annotated[bool, typer.Option("--base/--no-base", help="Load the base and compare its hash.")] = True,
) -> None:
    """Check that masks and checkpoints are undamaged and fit their base."""
    from mft.cli.verify import run_verify

    run_verify(directory, model, dtype, base=base)
