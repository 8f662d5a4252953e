"""Find the layers, or the kinds of linear layers, that a mask helps most: train a short mask on each group alone.

Every group gets the same settings and data, so the rows can be ranked. No group is tuned, so a row is not a verdict on
masks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

from rich.table import Table
from torch import nn

from mft.checks import check_rule
from mft.config import MaskConfig, TrainConfig, layer_ranges
from mft.evaluation.evaluate import Evaluation, paired_difference
from mft.files.figure import COLOURS, new_figure, save_figure
from mft.masks.convert import check_unmasked, convert
from mft.masks.inspection import flip_share, initial_masks
from mft.masks.targets import select_targets
from mft.models.causal_lm import clone_with_own_weights
from mft.models.frozen_layers import PrefixMemory
from mft.models.linears import layer_index, layer_stacks
from mft.tracking.metrics import Recorder
from mft.training.loop import train_masks

LEVEL = 0.05  # two-sided, for all groups together
_TITLE = "Validation loss with a mask - without, nats per token"
_COLUMNS = ("group", "weights", "before training", "trained", "s.e.", "flips %")


@dataclass(frozen=True)
class Group:
    """Linear layers that are masked together; override is the configuration override that chooses them."""

    name: str
    modules: tuple[str, ...]
    override: str


@dataclass(frozen=True)
class Sensitivity:
    """What a mask on one group does to the validation loss: differences from the unmasked model, nats per token."""

    group: Group
    weights: int
    first: float  # of the mask before training
    difference: float  # of the trained mask
    error: float  # standard error of difference over documents
    flips: float  # share of the group's weights whose bit training changed


def layer_groups(model: nn.Module, mask: MaskConfig, *, size: int = 1) -> list[Group]:
    """Return groups of ``size`` consecutive layers among those that mask chooses; the last group may be smaller."""
    check_rule(size >= 1, "size", "be at least 1", size)
    chosen = _group_names(model, mask, _layer_of(model))
    layers = sorted(chosen)
    groups = []
    for start in range(0, len(layers), size):
        part = layers[start : start + size]
        name = f"layer {part[0]}" if len(part) == 1 else f"layers {layer_ranges(part)}"
        modules = tuple(module for layer in part for module in chosen[layer])
        groups.append(Group(name, modules, f"mask.layers_to_transform={layer_ranges(part)}"))
    return groups


def kind_groups(model: nn.Module, mask: MaskConfig) -> list[Group]:
    """Return the layers that mask chooses, grouped by the last part of their names: q_proj, down_proj, ..."""
    chosen = _group_names(model, mask, lambda name: name.rpartition(".")[2])
    return [Group(kind, tuple(names), f"mask.target_modules=[{kind}]") for kind, names in chosen.items()]


def layer_sensitivity(
    model: nn.Module,
    train_rows,
    validation_rows,
    mask: MaskConfig,
    groups: Sequence[Group],
    train: TrainConfig,
    *,
    recorder: Recorder | None = None,
) -> list[Sensitivity]:
    """Mask and train each group on a clone of model. Return one row per group, best first.

    mask: its keep_ratio, init, mode and seed count. train: for each group; a few dozen steps are enough to rank.
    Raises: ValueError if model is masked, or there is no group.
    """
    check_unmasked(model)
    check_rule(bool(groups), "groups", "hold at least one group", list(groups))
    recorder = Recorder() if recorder is None else recorder
    start = recorder.evaluate("unmasked, validation", model, validation_rows)
    rows = [_try(model, train_rows, validation_rows, mask, group, train, recorder, start) for group in groups]
    return sorted(rows, key=lambda row: row.difference)


def recommendation(rows: Sequence[Sensitivity]) -> str:
    """Say which groups gain beyond chance, at LEVEL divided by the number of groups (Bonferroni), in one sentence."""
    z = NormalDist().inv_cdf(1 - LEVEL / (2 * len(rows)))
    clear = [row for row in rows if row.difference + z * row.error < 0]
    best = min(rows, key=lambda row: row.difference)
    if not clear:
        return (
            f"None of the {len(rows)} groups gains more than {z:.1f} standard errors; the best, {best.group.name} "
            f"({best.group.override}), changes the loss by {best.difference:+.4f} ± {best.error:.4f}."
        )
    named = ", ".join(f"{row.group.name} ({row.difference:+.4f})" for row in clear)
    return (
        f"{len(clear)} of {len(rows)} groups gain more than {z:.1f} standard errors: {named}. "
        f"Begin with {best.group.override}, and let validation choose between it and more of them."
    )


def sensitivity_table(rows: Sequence[Sensitivity]) -> Table:
    """Return the table for the console, in the order of rows."""
    table = Table(title=_TITLE)
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column == _COLUMNS[0] else "right")
    for row in rows:
        table.add_row(*_cells(row))
    return table


def sensitivity_markdown(rows: Sequence[Sensitivity]) -> str:
    """Return the same table and the recommendation as Markdown."""
    lines = [f"| {' | '.join(_COLUMNS)} |", f"|---|{'---:|' * (len(_COLUMNS) - 1)}"]
    lines += [f"| {' | '.join(_cells(row))} |" for row in rows]
    return "\n".join([f"{_TITLE}.", "", *lines, "", recommendation(rows), ""])


def plot_sensitivity(rows: Sequence[Sensitivity], path: Path) -> None:
    """Plot the differences with two standard errors, in the order of rows. Hollow points: before training."""
    figure = new_figure(7, 1.2 + 0.35 * len(rows))
    axes = figure.subplots()
    for place, row in enumerate(rows):
        axes.errorbar(row.difference, place, xerr=2 * row.error, fmt="o", color=COLOURS["mask"], capsize=3)
        axes.plot(row.first, place, "o", color="0.5", fillstyle="none")
    axes.axvline(0, color=COLOURS["base"], linestyle="--")
    axes.set_yticks(range(len(rows)), [row.group.name for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel(
        "loss with a mask on this group alone - loss without, nats per token (lower is better)\n"
        "filled: after training, 2 standard errors; hollow: before training"
    )
    best = min(rows, key=lambda row: row.difference)
    axes.set_title(f"A mask on {best.group.name} alone changes the loss by {best.difference:+.4f}, the lowest")
    save_figure(figure, path)


def _cells(row: Sensitivity) -> tuple[str, ...]:
    figures = (f"{row.first:+.4f}", f"{row.difference:+.4f}", f"{row.error:.4f}", f"{100 * row.flips:.2f}")
    return row.group.name, f"{row.weights:,}", *figures


def _try(
    model: nn.Module,
    train_rows,
    validation_rows,
    mask: MaskConfig,
    group: Group,
    train: TrainConfig,
    recorder: Recorder,
    start: Evaluation,
) -> Sensitivity:
    candidate = clone_with_own_weights(model)
    convert(candidate, group.modules, mask)
    layers = [_layer_of(model)(name) for name in group.modules]
    shared: dict[str, Any] = {
        "first": min(layers),
        "memory": PrefixMemory(),
    }  # both evaluations share the outputs of the layers below the group
    first = recorder.evaluate(f"{group.name}, before training", candidate, validation_rows, **shared)
    initial = initial_masks(candidate)
    with recorder.training(group.name, train_rows, train) as on_step:
        train_masks(candidate, train_rows, train, on_step=on_step)
    trained = recorder.evaluate(f"{group.name}, validation", candidate, validation_rows, **shared)
    difference, error = paired_difference(trained, start)
    weights = sum(mask.numel() for mask in initial.values())
    flips = flip_share(candidate, initial)
    return Sensitivity(group, weights, paired_difference(first, start)[0], difference, error, flips)


def _group_names(model: nn.Module, mask: MaskConfig, key: Callable[[str], object]) -> dict:
    """Return the names that mask chooses, grouped by key(name), in the model's order."""
    chosen: dict = {}
    for name in select_targets(model, mask):
        chosen.setdefault(key(name), []).append(name)
    return chosen


def _layer_of(model: nn.Module) -> Callable[[str], int]:
    stacks = layer_stacks(model)

    def layer(name: str) -> int:
        number = layer_index(name, stacks)
        if number is None:
            raise ValueError(f"groups must hold linear layers of the decoder's layers, got {name}")
        return number

    return layer
