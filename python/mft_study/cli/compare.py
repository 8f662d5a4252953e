"""The commands on a study: compare, ablate, plot."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mft.checks import check_one_of, check_rule, nearest
from mft.files.json_file import read_object
from mft.tracking.console import console, say
from mft.tracking.curves import PLOT
from mft.tracking.metrics import METRICS
from mft.tracking.progress import Progress
from mft.training.flips import plot_flips, read_flips
from mft.training.run_directory import ABLATION, TABLE_JSON, TABLE_MARKDOWN
from mft_study.ablate import derive, plot_ablation
from mft_study.arms.full import Full
from mft_study.config import StudyConfig
from mft_study.evidence.environment import environment
from mft_study.evidence.sums import FILE as SUMS
from mft_study.outcome import Findings
from mft_study.report.pictures.by_bytes import plot_bytes
from mft_study.report.pictures.figures import draw_overlap, draw_surface
from mft_study.report.pictures.forgetting import plot_forgetting
from mft_study.report.pictures.plots import plot_summary
from mft_study.report.write import console_report, write_study_report
from mft_study.store import FORGETTING, STUDY, copy_fine_tunes, fine_tunes_in
from mft_study.study_run import LOCAL, ON, run_study

PLOTS = ("summary", "bytes", "forgetting", "surface", "overlap", "flips")
_LARGEST_TABLE = 1 << 28  # bytes


def run_compare(
    study: StudyConfig,
    *,
    overwrite: bool,
    fine_tunes_of: Path | None = None,
    again: bool = False,
    joins: bool = False,
    same_processor: bool = False,
    on: str = LOCAL,
    begin: Callable[[], None] = lambda: None,
) -> None:
    """Do mft compare. fine_tunes_of: the directory of another study. For the other arguments, see run_study."""
    check_one_of("--on", on, tuple(ON))
    check_rule(on == LOCAL or not joins, "--join", "not come with --on, because its workers are in one cluster", on)
    directory = Path(study.output_dir)
    if fine_tunes_of is not None:
        check_rule(
            not joins, "--fine-tunes-of", "not come with --join: begin the study in a single process", fine_tunes_of
        )
        rule = "not come with --overwrite, which would delete what it copies; name a new output_dir"
        check_rule(not overwrite, "--fine-tunes-of", rule, fine_tunes_of)
        begin = partial(_take_fine_tunes, fine_tunes_of, study, directory)
    reported: list[Findings] = []

    def report(findings: Findings) -> None:
        write_study_report(findings, directory, environment())
        reported.append(findings)

    run_study(
        study,
        directory,
        console=console,
        overwrite=overwrite,
        again=again,
        joins=joins,
        same_processor=same_processor,
        on=on,
        begin=begin,
        report=report,
    )
    for findings in reported:
        for part in console_report(findings):
            console.print(part)
    if not reported:
        say("the report was written by another process that joined")
    pictures = [PLOT, FORGETTING] if any(study.general_of(domain) for domain in study.domains) else [PLOT]
    say(f"files: {directory}/ ({', '.join((TABLE_MARKDOWN, TABLE_JSON, SUMS, *pictures))})")


def run_ablate(
    study: StudyConfig,
    what: str,
    values: Sequence[str],
    domains: Sequence[str],
    masks: Sequence[str] = (),
    *,
    overwrite: bool,
) -> None:
    """mft ablate"""
    parent = Path(study.output_dir)
    study = derive(study, what, values, domains, masks)
    directory = Path(study.output_dir)

    def begin() -> None:
        if not overwrite and copy_fine_tunes(parent, study, directory):
            say(f"base model and fine-tunes: those of {parent}")

    run_compare(study, overwrite=overwrite, begin=begin)
    numbers = json.loads((directory / TABLE_JSON).read_text(encoding="utf-8"))
    plot_ablation(numbers, what, directory / ABLATION)
    say(f"written: {directory / ABLATION}")


def run_plot(
    what: str,
    directories: Sequence[Path],
    output: Path | None,
    *,
    domain: str | None,
    arm: str | None,
    rows: int,
    points: int,
) -> None:
    """Do mft plot. Without output, the picture is written next to what it shows."""
    if what not in PLOTS:
        raise ValueError(f"the plot must be one of {', '.join(PLOTS)}, got {what!r}{nearest(what, PLOTS)}")
    directory, *others = directories
    if others and what != "flips":
        raise ValueError(f"{what} must be drawn from one directory, got {len(directories)}")
    if output is None:
        output = (directory.parent if directory.is_file() else directory) / f"{what}.png"
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
        draw = {"summary": plot_summary, "bytes": plot_bytes, "forgetting": plot_forgetting}[what]
        draw(_study_table(directory), output)
    say(f"written: {output}")


def _take_fine_tunes(parent: Path, study: StudyConfig, directory: Path) -> None:
    """Copy the fine-tunes of another study into directory, unless a study was begun there, which keeps its own."""
    if (directory / STUDY).is_file():
        say(f"fine-tunes: {directory} has begun and continues with its own; nothing is copied from {parent}")
        return
    found = fine_tunes_in(parent, study)
    rule = f"hold fine-tunes of the same model, data and settings as arms.{study.first_of_kind(Full)} here"
    check_rule(found > 0, "--fine-tunes-of", rule, f"{parent} with none")
    if copy_fine_tunes(parent, study, directory):
        say(f"fine-tunes: {found} runs of {parent}")


def _study_table(directory: Path) -> dict[str, Any]:
    """Return the numbers in the table.json of a study."""
    table = directory if directory.is_file() else directory / TABLE_JSON
    rule = f"directory must be a finished study's, as mft compare and mft ablate write it, or its {TABLE_JSON}"
    if not table.is_file():
        raise ValueError(f"{rule}, got {directory}")
    numbers = read_object(table, _LARGEST_TABLE) if table.suffix == ".json" else {}
    if not isinstance(numbers.get("domains"), dict):
        raise ValueError(
            f"{rule}, got {directory} with a table without domains: a run of mft train has its curves in {PLOT}, and "
            "mft plot flips draws how its masks moved"
        )
    return numbers
