"""What the verbs of the command line do with a study: compare, ablate, plot."""

import json
from collections.abc import Sequence
from pathlib import Path

from mft.choices import nearest
from mft.console import console, say
from mft.flips import plot_flips, read_flips
from mft.progress import Progress
from mft.run_directory import ABLATION, METRICS, PLOT, TABLE_JSON, TABLE_MARKDOWN
from mft.study.ablate import derive, plot_ablation
from mft.study.declared import StudyConfig
from mft.study.environment import environment
from mft.study.figures import draw_overlap, draw_surface
from mft.study.plots import plot_summary
from mft.study.report import console_report, write_study_report
from mft.study.run import run_study
from mft.study.store import copy_fine_tunes

PLOTS = ("summary", "surface", "overlap", "flips")


def run_compare(study: StudyConfig, *, overwrite: bool) -> None:
    """mft compare"""
    directory = Path(study.output_dir)
    findings = run_study(study, directory, console=console, overwrite=overwrite)
    write_study_report(findings, directory, environment())
    for part in console_report(findings):
        console.print(part)
    say(f"files: {directory}/ ({TABLE_MARKDOWN}, {TABLE_JSON}, {PLOT})")


def run_ablate(
    study: StudyConfig, what: str, values: Sequence[str], domains: Sequence[str], *, overwrite: bool
) -> None:
    """mft ablate"""
    parent = Path(study.output_dir)
    study = derive(study, what, values, domains)
    directory = Path(study.output_dir)
    if not overwrite and copy_fine_tunes(parent, study, directory):
        say(f"base model and fine-tunes: those of {parent}")
    run_compare(study, overwrite=overwrite)
    numbers = json.loads((directory / TABLE_JSON).read_text(encoding="utf-8"))
    plot_ablation(numbers, what, directory / ABLATION)
    say(f"written: {directory / ABLATION}")


def run_plot(
    what: str,
    directories: Sequence[Path],
    output: Path,
    *,
    domain: str | None,
    arm: str | None,
    rows: int,
    points: int,
) -> None:
    """mft plot"""
    if what not in PLOTS:
        raise ValueError(f"the plot must be one of {', '.join(PLOTS)}, got {what!r}{nearest(what, PLOTS)}")
    directory, *others = directories
    if others and what != "flips":
        raise ValueError(f"{what} must be drawn from one directory, got {len(directories)}")
    if what == "surface":
        with Progress(console).phase("loss surface", 3 * points * points) as phase:
            draw_surface(
                directory,
                output,
                domain=domain,
                arm=arm,
                rows=rows,
                points=points,
                on_point=lambda done, of: phase.advance(1),
            )
    elif what == "overlap":
        draw_overlap(directory, output, arm=arm)
    elif what == "flips":
        plot_flips({str(run): read_flips(run / METRICS) for run in directories}, output)
    else:
        table = directory if directory.is_file() else directory / TABLE_JSON
        if not table.is_file():
            raise ValueError(f"directory must be a finished study's, or its {TABLE_JSON}, got {directory}")
        plot_summary(table, output)
    say(f"written: {output}")
