"""mft sensitivity: train a mask briefly on each group of layers, and rank the groups."""

import dataclasses
import json
from pathlib import Path

from mft.checks import check_rule
from mft.config import RunConfig
from mft.evaluation.evaluated_base import check_exact
from mft.files.atomic import write_whole
from mft.models.pretrained import load_outline
from mft.tracking.console import console, say
from mft.tracking.curves import PLOT
from mft.tracking.metrics import Recorder
from mft.tracking.progress import Progress
from mft.training.inputs import read_data, read_model
from mft.training.run_directory import TABLE_JSON, TABLE_MARKDOWN, check_run_directory, holding, open_run
from mft_study.sensitivity import (
    kind_groups,
    layer_groups,
    layer_sensitivity,
    plot_sensitivity,
    recommendation,
    sensitivity_markdown,
    sensitivity_table,
)


def run_sensitivity(config: RunConfig, size: int | None, *, overwrite: bool) -> None:
    """mft sensitivity"""
    check_exact(config.model, "sensitivity")
    check_rule(
        config.objective.name == "cross_entropy",
        "objective.name",
        "be cross_entropy for mft sensitivity, which ranks by the loss",
        config.objective.name,
    )
    for key in ("eval_every", "eval_minutes"):
        value = getattr(config.train, key)
        check_rule(value is None, f"train.{key}", "be null for mft sensitivity, because its runs are short", value)
    check_rule(
        not config.report_to, "report_to", "be [] for mft sensitivity, because it starts many runs", config.report_to
    )
    check_run_directory(config.output_dir, overwrite=True)
    with holding(Path(config.output_dir)):
        check_run_directory(config.output_dir, overwrite=overwrite)
        splits = read_data(config)
        validation = splits.rows_of("validation")
        outline = load_outline(config.model)
        groups = kind_groups(outline, config.mask) if size is None else layer_groups(outline, config.mask, size=size)
        model, _ = read_model(config.model)
        directory = open_run(config.output_dir, config, overwrite=overwrite)
        recorder = Recorder(directory, Progress(console))
        rows = layer_sensitivity(model, splits.train, validation, config.mask, groups, config.train, recorder=recorder)
        console.print(sensitivity_table(rows))
        say(recommendation(rows))
        write_whole(directory / TABLE_MARKDOWN, sensitivity_markdown(rows))
        write_whole(directory / TABLE_JSON, json.dumps([dataclasses.asdict(row) for row in rows], indent=2) + "\n")
        plot_sensitivity(sorted(rows, key=lambda row: groups.index(row.group)), directory / PLOT)
        say(f"table and plot: {directory}/")
