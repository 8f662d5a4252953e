"""The verbs of "Share": push, import-masks, export-masks, recode.

`mft --help` imports this file and should not wait for transformers: each verb imports its modules itself.
"""

from pathlib import Path
from typing import Annotated

import typer

from mft.cli.options import SHARE, AnyBase, BaseDtype, BaseModel, Masks

verbs = typer.Typer()


@verbs.command(rich_help_panel=SHARE)
def push(
    directory: Annotated[
        Path, typer.Argument(help="An output_dir or its masks/, an adapter that PEFT saved, or a merged model.")
    ],
    repository: Annotated[str, typer.Argument(help="user/name on the hub; created if it does not exist.")],
    revision: Annotated[
        str | None,
        typer.Option("--revision", "--branch", help="A branch, created if it does not exist; by default main."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Create the repository as private.")] = False,
    message: Annotated[str | None, typer.Option("--message", "-m", help="The commit message.")] = None,
    license: Annotated[
        str | None, typer.Option(help="The card's license, such as apache-2.0; by default the base's, if known here.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The base's name on the hub, if this machine knows it by a path.")
    ] = None,
    coding: Annotated[
        str | None, typer.Option(help="For masks: rice (entropy-coded) or packed; by default unchanged.")
    ] = None,
    overwrite_card: Annotated[
        bool,
        typer.Option("--overwrite-card", help="Replace a README.md on the hub, also if somebody wrote it by hand."),
    ] = False,
) -> None:
    """Upload masks or a merged model to the Hugging Face Hub, with a model card."""
    from mft.publishing.push import push_to_hub
    from mft.tracking.console import say

    pushed = push_to_hub(
        directory,
        repository,
        revision=revision,
        private=private,
        message=message,
        license=license,
        base=base,
        coding=coding,
        overwrite_card=overwrite_card,
    )
    for note in pushed.notes:
        say(f"note: {note}")
    say(f"pushed {directory} to {pushed.url}")
    say(f"revision: {pushed.revision}; {repository}@{pushed.revision} always names exactly this state")


@verbs.command("import-masks", rich_help_panel=SHARE)
def import_masks(
    path: Annotated[Path, typer.Argument(help="A masks.pt of the paper's code.")],
    output: Annotated[Path, typer.Argument(help="Output directory.")],
    model: Annotated[str, typer.Option(help="The base of these masks.")],
    dtype: Annotated[str, typer.Option(help="The base's dtype.")] = "bfloat16",
) -> None:
    """Import masks of the paper's code.

    This is the only pickle that mft reads, with torch's weights-only loader.
    """
    from mft.cli.masks import run_import_masks

    run_import_masks(path, output, model, dtype)


@verbs.command("export-masks", rich_help_panel=SHARE)
def export_masks(
    masks: Masks,
    output: Annotated[Path, typer.Argument(help="The new masks.pt.")],
    model: BaseModel = None,
    dtype: BaseDtype = None,
    force: AnyBase = False,
) -> None:
    """Export masks for the paper's code."""
    from mft.cli.masks import run_export_masks

    run_export_masks(masks, output, model, dtype, force=force)


@verbs.command(rich_help_panel=SHARE)
def recode(
    masks: Masks,
    output: Annotated[Path, typer.Argument(help="Output directory; may be that of the masks.")],
    coding: Annotated[
        str,
        typer.Option(
            help="rice: about the entropy; by_weight: smaller, needs the base to read; packed: 1 bit per weight."
        ),
    ] = "rice",
    model: BaseModel = None,
    dtype: BaseDtype = None,
) -> None:
    """Write the same masks in another coding, such as one with a smaller file.

    The content hash stays the same. Only by_weight loads the base.
    """
    from mft.cli.masks import run_recode

    run_recode(masks, output, coding, model, dtype)
