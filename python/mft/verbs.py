"""What the verbs of the command line do, in the order in which they do it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table

from mft.bases import base_words, check_exact, evaluated_base, keeping_all
from mft.compare import compare
from mft.config import ModelConfig, RunConfig, load_config
from mft.convert import mask_model, masked_modules, merge_model, print_trainable_parameters
from mft.data import Splits, load_splits
from mft.evaluate import Evaluation, paired_difference
from mft.export import load_masks, save_masks
from mft.export_file import read_export
from mft.fit import plan_training
from mft.inspection import MaskStatistics, flip_share, initial_masks, mask_statistics
from mft.models import load_model, save_model
from mft.plots import plot_curves
from mft.progress import Progress
from mft.quantized import quantize_model
from mft.recipe import finetune, train_masks
from mft.recorder import Recorder
from mft.report import console_table, evaluation_table, remarks, verdict, write_report
from mft.run_directory import CONFIG, MASKS, MODEL, PLOT, TABLE_JSON, TABLE_MARKDOWN, check_run_directory, open_run
from mft.targets import select_targets

console = Console()


def run_finetune(config: RunConfig, *, overwrite: bool) -> None:
    """mft finetune"""
    check_exact(config.model, "finetune")
    check_run_directory(config.output_dir, overwrite=overwrite)
    model, tokenizer = _load(config.model)
    splits = _load_data(config, tokenizer)
    directory, recorder = _begin(config, overwrite)
    before = recorder.evaluate("before, validation", model, splits.validation)
    model.requires_grad_(True)
    print_trainable_parameters(model)
    with recorder.training("full fine-tune", splits.train, config.train) as on_step:
        finetune(model, splits.train, config.train, on_step=on_step)
    after = recorder.evaluate("after, validation", model, splits.validation)
    save_model(model, tokenizer, directory / MODEL)
    _finish(directory, recorder, before, after, directory / MODEL)


def run_train(config: RunConfig, *, overwrite: bool) -> None:
    """mft train"""
    check_run_directory(config.output_dir, overwrite=overwrite)
    plan = plan_training(config)
    console.print(plan.reason, highlight=False, soft_wrap=True)
    kind = config.model.quantization = plan.quantization
    model, tokenizer = load_model(config.model)
    if plan.way == "plain":
        model.to(plan.device)
    splits = _load_data(config, tokenizer)
    select_targets(model, config.mask)  # raises before anything is written
    directory, recorder = _begin(config, overwrite)
    where: dict[str, Any] = {"way": plan.way, "device": plan.device}
    evaluated = where if plan.way == "plain" else where | {"batch_size": config.train.batch_size}
    if kind is None:
        before = recorder.evaluate("before, validation", model, splits.validation, **evaluated)
    mask_model(model, config.mask)
    if kind is not None:
        quantize_model(model, kind, masked=config.model.quantize_masked)
        with keeping_all(model):
            before = recorder.evaluate(f"before in {kind}, validation", model, splits.validation, **evaluated)
    print_trainable_parameters(model)
    initial = initial_masks(model)
    with recorder.training("mask fine-tune", splits.train, config.train) as on_step:
        train_masks(model, splits.train, config.train, remember=plan.remember, on_step=on_step, **where)
    after = recorder.evaluate("after, validation", model, splits.validation, **evaluated)
    save_masks(model, directory / MASKS, base_model_name_or_path=config.model.name)
    console.print(
        f"{100 * flip_share(model, initial):.2f} % of the mask's bits flipped since initialisation", highlight=False
    )
    _finish(directory, recorder, before, after, directory / MASKS)
    console.print(
        f"next: mft inspect {directory}, or mft merge {directory} <directory>", highlight=False, soft_wrap=True
    )


def run_evaluate(config: RunConfig, masks: Path | None, split: str, *, force: bool, unquantized: bool) -> None:
    """mft evaluate"""
    if split not in ("validation", "test"):
        raise ValueError(f"--split must be validation or test, got {split!r}")
    directory = None if masks is None else _masks_directory(masks)
    export = None if directory is None else read_export(directory)[0]
    kind, quantize_masked = evaluated_base(config.model, export, unquantized)
    model, tokenizer = _load(config.model)
    dataset = getattr(_load_data(config, tokenizer), split)
    recorder = Recorder(progress=Progress(console))
    name = config.model.name if kind is None else f"{config.model.name} in {kind}"
    results = {}
    if kind is None:
        results[name] = recorder.evaluate(f"{name}, {split}", model, dataset)
    if directory is not None:
        load_masks(model, directory, force=force)
    if kind is not None:
        quantize_model(model.requires_grad_(False), kind, masked=quantize_masked)
        with keeping_all(model):
            results[name] = recorder.evaluate(f"{name}, {split}", model, dataset)
    if directory is not None:
        results["with masks"] = recorder.evaluate(f"with masks, {split}", model, dataset)
    console.print(evaluation_table(split, results))
    console.print(base_words(kind, quantize_masked, export), highlight=False, soft_wrap=True)


def run_compare(
    config: RunConfig,
    base_name: str | None,
    mask_lrs: Sequence[float],
    control_lrs: Sequence[float],
    *,
    overwrite: bool,
) -> None:
    """mft compare"""
    check_exact(config.model, "compare")
    check_run_directory(config.output_dir, overwrite=overwrite)
    model, tokenizer = _load(config.model)
    base = None if base_name is None else _load(ModelConfig(name=base_name, dtype=config.model.dtype))[0]
    splits = _load_data(config, tokenizer)
    directory, recorder = _begin(config, overwrite)
    comparison = compare(
        model,
        splits,
        config.mask,
        config.train,
        mask_lrs=mask_lrs,
        control_lrs=control_lrs,
        base=base,
        recorder=recorder,
    )
    save_masks(comparison.masked, directory / MASKS, base_model_name_or_path=config.model.name)
    write_report(comparison, directory, recorder.curves, splits.notes)
    console.print(console_table(comparison))
    for line in (verdict(comparison), *remarks(comparison)):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(
        f"files: {directory}/ ({TABLE_MARKDOWN}, {TABLE_JSON}, {PLOT}, {MASKS}/)", highlight=False, soft_wrap=True
    )


def run_merge(masks: Path, output: Path, model_name: str | None, dtype: str, *, force: bool) -> None:
    """mft merge"""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output must be a new or empty directory, got {output}")
    directory = _masks_directory(masks)
    model, tokenizer = _base_of(directory, model_name, dtype)
    load_masks(model, directory, force=force)
    kind = read_export(directory)[0].base_quantization
    kept = sum(int(module.mask().sum()) for module in masked_modules(model).values())
    total = sum(module.weight.numel() for module in masked_modules(model).values())
    save_model(merge_model(model), tokenizer, output)
    console.print(
        f"merged: {kept} of {total} masked weights kept, the others are 0; the model lies in {output}",
        highlight=False,
        soft_wrap=True,
    )
    if kind is not None:
        console.print(
            f"the masks were learned on a base in {kind}; the merged weights are the exact ones: "
            "mft evaluate --unquantized tells what that changes",
            highlight=False,
            soft_wrap=True,
        )


def run_inspect(masks: Path, model_name: str | None, dtype: str, *, force: bool) -> None:
    """mft inspect"""
    directory = _masks_directory(masks)
    run_config, initial = directory.parent / CONFIG, None
    model, _ = _base_of(directory, model_name, dtype)
    if run_config.is_file():
        # Scores begin as a function of configuration, layer name and weight alone, so the first masks can be remade.
        initial = initial_masks(mask_model(model, load_config(str(run_config)).mask))
        model, _ = _base_of(directory, model_name, dtype)
    load_masks(model, directory, force=force)
    console.print(_mask_table(mask_statistics(model, initial)))
    if initial is None:
        console.print(f"flips are unknown: no {run_config} tells how the scores began", highlight=False, soft_wrap=True)


# ---------------------------------------------------------------------------------------------- private


def _begin(config: RunConfig, overwrite: bool) -> tuple[Path, Recorder]:
    directory = open_run(config.output_dir, config, overwrite=overwrite)
    return directory, Recorder(directory, Progress(console))


def _load(config: ModelConfig) -> tuple[Any, Any]:
    """(model, tokenizer), the model on the GPU if there is one."""
    model, tokenizer = load_model(config)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def _load_data(config: RunConfig, tokenizer) -> Splits:
    splits = load_splits(config.data, tokenizer)
    for note in splits.notes:
        console.print(note, style="dim", highlight=False, soft_wrap=True)
    return splits


def _finish(directory: Path, recorder: Recorder, before: Evaluation, after: Evaluation, result: Path) -> None:
    results = {"before": before, "after": after}
    table = evaluation_table("validation", results)
    console.print(table)
    with (directory / TABLE_MARKDOWN).open("w", encoding="utf-8") as file:
        Console(file=file, width=120).print(table)
    difference, error = paired_difference(after, before)
    (directory / TABLE_JSON).write_text(
        json.dumps(
            {name: {"loss": result.loss, "accuracy": result.accuracy} for name, result in results.items()}
            | {"loss after - before": difference, "standard error": error},
            indent=2,
        )
        + "\n",
        encoding="utf-8",
    )
    plot_curves(recorder.curves, directory / PLOT)
    console.print(f"result: {result}; metrics, table and plot: {directory}/", highlight=False, soft_wrap=True)


def _masks_directory(path: Path) -> Path:
    """masks/ of a run, or the directory itself."""
    return path / MASKS if (path / MASKS).is_dir() else path


def _base_of(directory: Path, model_name: str | None, dtype: str):
    """(model, tokenizer) that the masks in directory are for."""
    name = model_name or read_export(directory)[0].base_model_name_or_path
    if name is None:
        raise ValueError(f"--model must name the base, {directory} does not")
    return load_model(ModelConfig(name=name, dtype=dtype))


def _mask_table(rows: list[MaskStatistics]) -> Table:
    table = Table(
        Column("layer", overflow="fold"),  # the end of a name is what tells layers apart
        *(
            Column(heading, justify="right")
            for heading in ("weights", "kept", "flips since init", "dropped as by magnitude")
        ),
    )
    for row in rows:
        flips = "?" if row.flips is None else f"{100 * row.flips:.2f} %"
        table.add_row(row.name, str(row.weights), f"{100 * row.kept:.2f} %", flips, f"{100 * row.overlap:.1f} %")
    return table
