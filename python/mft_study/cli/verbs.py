"""The verbs on studies. `mft --help` imports this file, so each verb imports its modules itself."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mft.cli.keys import Keyed
from mft.cli.options import STUDY, Config, Overrides, Overwrite, Set, given_overrides
from mft.config_file import load_config
from mft.tracking.console import say

verbs = typer.Typer()


class StudyKeys(Keyed):
    """A command on a study."""

    def schema(self) -> dict[str, Any]:
        from mft_study.load import study_schema  # takes a tenth of a second

        return study_schema()

    def print_keys(self, verb: str) -> None:
        say(f" {verb} --help KEY explains a key, or a section such as arms. All keys: docs/reference/configuration.md")


@verbs.command(cls=StudyKeys, rich_help_panel=STUDY)
def compare(
    config: Annotated[
        str,
        typer.Option(
            "--config", "-c", help="own (your data), demo, small, smollm2, board-small, board-smollm2, or a YAML file."
        ),
    ] = "small",
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Overrides, such as seeds=[0,1].", metavar="[KEY=VALUE]...")
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", "-s", help="Override, such as arms.MFT.lrs=[1e-3]; repeatable.")
    ] = None,
    fine_tunes_of: Annotated[
        Path | None,
        typer.Option(
            "--fine-tunes-of", help="Another study's output_dir, to reuse its fine-tunes if they match this study."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete an existing study in output_dir.")] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Use the reserve again; normally a study uses it once.")
    ] = False,
    join: Annotated[
        bool, typer.Option("--join", help="Share the work with other --join processes, on any machine with this disk.")
    ] = False,
    same_processor: Annotated[
        bool, typer.Option("--same-processor", help="Refuse units that ran on another kind of processor than this one.")
    ] = False,
    on: Annotated[
        str, typer.Option("--on", help="Where workers run: local, or ray (a Ray cluster, which needs no shared disk).")
    ] = "local",
) -> None:
    """Compare masks with tuned baselines over several seeds.

    Settings are chosen on validation data and reported on test data. An interrupted study continues.
    """
    from mft_study.load import load_study

    study = load_study(config, [*(overrides or []), *(sets or [])])
    from mft_study.cli.compare import run_compare

    run_compare(
        study,
        overwrite=overwrite,
        fine_tunes_of=fine_tunes_of,
        again=again,
        joins=join,
        same_processor=same_processor,
        on=on,
    )


@verbs.command(cls=StudyKeys, rich_help_panel=STUDY)
def ablate(
    what: Annotated[str, typer.Argument(help="ratio, layers or data.")],
    config: Annotated[str, typer.Option("--config", "-c", help="The study to derive from.")] = "small",
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Overrides of that study, such as seeds=[0,1].", metavar="[KEY=VALUE]...")
    ] = None,
    values: Annotated[
        str | None, typer.Option(help="Keep ratios, groups of layers (0-3,4-7) or shares of the data.")
    ] = None,
    domains: Annotated[
        list[str] | None, typer.Option("--domain", help="A domain of the study; repeatable; all if not given.")
    ] = None,
    arms: Annotated[
        list[str] | None, typer.Option("--arm", help="A mask of the study; repeatable; all if not given.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete an existing study in its directory.")] = False,
) -> None:
    """Compare keep ratios, masked layers or shares of the data, with the same baselines.

    An interrupted study continues.
    """
    from mft_study.load import load_study

    study = load_study(config, overrides or [])
    from mft_study.cli.compare import run_ablate

    given = [] if values is None else values.split(",")
    run_ablate(study, what, given, domains or [], arms or [], overwrite=overwrite)


@verbs.command(cls=Keyed, rich_help_panel=STUDY)
def sensitivity(
    config: Config = None,
    overrides: Overrides = None,
    sets: Set = None,
    layers: Annotated[int, typer.Option(min=1, help="Layers in a group.")] = 1,
    kinds: Annotated[bool, typer.Option("--kinds", help="Group layers by kind instead, such as down_proj.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Rank groups of layers by how much a short mask training on each lowers the loss."""
    run_config = load_config(config, given_overrides(overrides, sets))
    from mft_study.cli.sensitivity import run_sensitivity

    run_sensitivity(run_config, None if kinds else layers, overwrite=overwrite)


@verbs.command(rich_help_panel=STUDY)
def plot(
    what: Annotated[str, typer.Argument(help="summary, bytes, forgetting, surface, overlap or flips.")],
    directories: Annotated[
        list[Path],
        typer.Argument(
            help="A finished study of mft compare; for summary, bytes and forgetting also a table.json; for flips, "
            "runs of mft train."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The PNG file; by default next to what it shows.")
    ] = None,
    domain: Annotated[str | None, typer.Option(help="For surface: the domain; the first if not given.")] = None,
    arm: Annotated[str | None, typer.Option(help="For surface, overlap: an arm of MFT; by default the first.")] = None,
    rows: Annotated[int, typer.Option(help="For surface: validation rows for every point.")] = 32,
    points: Annotated[int, typer.Option(help="For surface: points along each axis.")] = 11,
) -> None:
    """Draw pictures of a study, or of how masks change during training.

    They are summary (differences from the control), bytes (loss against file size), forgetting (gain against loss on
    other text), surface (of the loss), overlap (of masks) and flips (over training).
    """
    from mft_study.cli.compare import run_plot

    run_plot(what, directories, output, domain=domain, arm=arm, rows=rows, points=points)
