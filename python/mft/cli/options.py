"""What several verbs share: the groups of `mft --help`, and options."""

from pathlib import Path
from typing import Annotated

import typer

from mft.config_file import check_overrides

# The groups of `mft --help`, in this order.
START, TRAIN, USE, SHARE, STUDY, INSPECT = PANELS = ("Start here", "Train", "Use", "Share", "Study", "Inspect")

Config = Annotated[Path | None, typer.Option("--config", "-c", help="YAML file, or paper; by default none.")]
Set = Annotated[list[str] | None, typer.Option("--set", "-s", help="Override, such as train.lr=3e-4; repeatable.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Overrides, such as train.lr=3e-4; --help KEY explains a key.", metavar="[KEY=VALUE]..."),
]
Resume = Annotated[
    Path | None, typer.Option("--resume", help="Continue the run in this output_dir, with its own configuration.")
]
Force = Annotated[bool, typer.Option("--force", help="Resume even if configuration, data or base have changed.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete an existing run in output_dir.")]

Masks = Annotated[
    str, typer.Argument(help="An output_dir of mft train, its masks/, or user/repo[@revision] of the hub.")
]
BaseModel = Annotated[str | None, typer.Option(help="The base; by default the one that the masks were learned on.")]
AnyBase = Annotated[bool, typer.Option("--force", help="Use masks that were learned on another base.")]
BaseDtype = Annotated[str | None, typer.Option(help="The base's dtype; by default the one used in training.")]


def given_overrides(overrides: list[str] | None, sets: list[str] | None) -> list[str]:
    """Return all overrides. Raises: ValueError for an unknown key."""
    given = [*(overrides or []), *(sets or [])]
    check_overrides(given)
    return given
