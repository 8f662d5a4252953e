"""The commands on finished masks: merge, inspect, recode, and the exchange with the paper's own files."""

import dataclasses
import json
import math
from pathlib import Path

import torch
from rich import box
from rich.table import Column, Table

from mft.checks import check_one_of
from mft.config import CODINGS, CONFIG, DATA_INITS, ModelConfig
from mft.config_file import load_saved
from mft.evaluation.evaluated_base import config_of_run
from mft.files.mask_coding import BY_NAME
from mft.masks.budget import grow_budget
from mft.masks.convert import check_interpolable, mask_model, masked_modules, merge_model
from mft.masks.export import load_masks, recode_masks, save_masks
from mft.masks.export_format import MASK_FILE, MaskExport, read_description, read_export
from mft.masks.inspection import (
    MaskStatistics,
    combine_statistics,
    describe_size,
    group_by_kind,
    initial_masks,
    mask_statistics,
)
from mft.masks.location import masks_directory
from mft.masks.paper_masks import import_paper_masks, write_paper_masks
from mft.models.pretrained import load_model, save_model
from mft.publishing.facts import MERGED, facts_of_export, facts_of_masks, merged_facts
from mft.tracking.console import console, say
from mft.training.inputs import read_base


def run_merge(
    masks: str, output: Path, model_name: str | None, dtype: str | None, *, force: bool, alpha: float = 1.0
) -> None:
    """mft merge"""
    check_merged("output", output)
    directory = masks_directory(masks)
    export = read_export(directory)
    check_interpolable(alpha, export.modules_to_save or ())  # before the base is loaded
    model, tokenizer = read_base(directory, model_name, dtype)
    load_masks(model, directory, force=force)
    kept = sum(int(module.mask().sum()) for module in masked_modules(model).values())
    total = sum(module.weight.numel() for module in masked_modules(model).values())
    facts = _facts(directory, export, model.config._name_or_path, alpha, force=force)
    save_model(merge_model(model, alpha=alpha), tokenizer, output, beside={MERGED: facts})
    others = "the others are 0" if alpha == 1 else f"the others are scaled by {1 - alpha:.6g}"
    say(f"merged: {kept} of {total} masked weights kept, {others}; the model lies in {output}")
    if export.base_quantization is not None:
        say(
            f"the masks were learned on a base in {export.base_quantization}; the merged weights are the exact ones: "
            "mft evaluate --unquantized tells what that changes"
        )


def check_merged(name: str, output: Path) -> None:
    """Raise ValueError unless a model may be written to output. name: the argument's name, for the message."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{name} must be a new or empty directory, got {output}")


def run_inspect(masks: str, model_name: str | None, dtype: str | None, *, force: bool, every_row: bool = False) -> None:
    """Do mft inspect. every_row: show one row per masked layer, else one for all whose names differ only in numbers."""
    directory = masks_directory(masks)
    run_config, initial = config_of_run(directory), None
    model, _ = read_base(directory, model_name, dtype)
    why = f"no {CONFIG} of the run next to {directory} tells how the scores were initialised"
    mask_config = None if run_config is None else load_saved(run_config).mask
    if mask_config is not None and mask_config.init not in DATA_INITS:
        # Initial scores depend only on configuration, layer name and weight, so the first masks can be computed again.
        mask_model(model, mask_config)
        grow_budget(model, 0, 1)
        initial = initial_masks(model)
    load_masks(model, directory, force=force)
    if mask_config is not None and mask_config.init in DATA_INITS:
        why = f"mask.init={mask_config.init} initialised the scores from data, with {mask_config.rule}"
        if mask_config.threshold is not None:  # then all scores begin at it or above
            initial = {name: torch.ones_like(mask) for name, mask in initial_masks(model).items()}
    rows = mask_statistics(model, initial)
    console.print(
        _mask_table(rows if every_row else group_by_kind(rows), combine_statistics(rows, f"total of {len(rows)}"))
    )
    if not every_row and len(group_by_kind(rows)) < len(rows):
        say("--all shows a row per masked layer")
    if initial is None:
        say(f"flips are unknown: {why}")


def run_recode(masks: str, output: Path, coding: str, model_name: str | None, dtype: str | None) -> None:
    """mft recode"""
    check_one_of("coding", coding, CODINGS)
    directory = masks_directory(masks)
    found = read_export(directory)
    before, model = (directory / MASK_FILE).stat().st_size, None
    if any(BY_NAME[name].needs_weight for name in (found.coding, coding)):
        model, _ = read_base(directory, model_name, dtype)
    path = recode_masks(directory, output, coding=coding, model=model)
    export = read_description(path)
    weights = sum(math.prod(entry.shape) for entry in export.modules)
    size = describe_size((path / MASK_FILE).stat().st_size, weights, export.modules_to_save)
    say(f"{coding}: {size}, after {before} bytes; content hash {export.content_hash} stays; {path}")


def run_import_masks(path: Path, output: Path, model_name: str, dtype: str) -> None:
    """mft import-masks"""
    model, _ = load_model(ModelConfig(name=model_name, dtype=dtype))
    import_paper_masks(model, path)
    save_masks(model, output, base_model_name_or_path=model_name)
    say(f"{len(masked_modules(model))} masks of {path} on {model_name}: {output}")


def run_export_masks(masks: str, output: Path, model_name: str | None, dtype: str | None, *, force: bool) -> None:
    """mft export-masks"""
    if output.exists():
        raise ValueError(f"output must be a new file, got {output}")
    directory = masks_directory(masks)
    model, _ = read_base(directory, model_name, dtype)
    load_masks(model, directory, force=force)
    write_paper_masks(model, output)
    say(f"{len(masked_modules(model))} masks of {directory} in the form of the paper's code: {output}")


# ---------------------------------------------------------------------------------------------- private


def _facts(directory: Path, export: MaskExport, base: str, alpha: float, *, force: bool) -> str:
    """Return the content of MERGED: what a merged model's card will say about the masks."""
    try:
        facts = facts_of_masks(directory, export)
    except ValueError as error:
        say(f"the merged model's card will say nothing about the run: {error}")
        facts = facts_of_export(export)
    facts = dataclasses.replace(facts, base_model_name_or_path=base)
    if alpha != 1:  # the run's losses hold only for alpha = 1
        facts = dataclasses.replace(facts, alpha=alpha, results=None)
    if force:  # the base may not be the one that the masks were learned on
        facts = dataclasses.replace(facts, base_hash=None, results=None)
    return json.dumps(merged_facts(facts), indent=2) + "\n"


def _mask_table(rows: list[MaskStatistics], total: MaskStatistics) -> Table:
    table = Table(
        Column("layer", overflow="fold"),  # the end of a name tells layers apart
        *(
            Column(heading, justify="right")
            for heading in ("million\nweights", "kept", "flips\nsince\ninit", "dropped\nas by\nmagnitude")
        ),
        box=box.SIMPLE_HEAD,  # so that the name of an experts' projection fits in 80 columns
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    for row in rows:
        table.add_row(*_cells(row))
    table.add_section()
    table.add_row(*_cells(total))
    return table


def _cells(row: MaskStatistics) -> list[str]:
    flips = "?" if row.flips is None else f"{100 * row.flips:.2f} %"
    return [row.name, f"{row.weights / 1e6:.3f}", f"{100 * row.kept:.2f} %", flips, f"{100 * row.overlap:.1f} %"]
