"""The paper's ablations as studies: which share is kept, which layers are masked, how much data there is.

Each is a study of its own, derived from a declared one, with the same fine-tune, control and grids of rates.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mft.checks import check_rule, nearest
from mft.config import parse_layers
from mft.files.figure import COLOURS, new_figure, save_figure, shade
from mft_study.arms.arm import Arm
from mft_study.arms.full import Control, Full
from mft_study.arms.kinds import KINDS, make_arm, name_of
from mft_study.arms.masks import Mask
from mft_study.config import StudyConfig

RATIOS = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
SHARES = (0.1, 0.25, 0.5, 1.0)
# The kinds that are drawn, by their names in table.json.
_COLOURS = {
    "mask": [shade(COLOURS["mask"], number) for number in range(4)],
    "control": [COLOURS["control"]],
    "magnitude": [shade(COLOURS["one-shot mask"], 2)],
    "random": [shade(COLOURS["one-shot mask"], 1)],
}


def ratio_study(study: StudyConfig, values: Sequence[str] = ()) -> StudyConfig:
    """Derive a study of masks at every keep ratio: trained, by magnitude, random. Masks without a ratio stay too."""
    ratios = [_number(value) for value in values] or list(RATIOS)
    masks = _masks(study)
    by_ratio = {name: arm for name, arm in masks.items() if arm.choices(study.mask).get("keep_ratio")}
    arms = _prototypes(study, Full, Control) | {name: arm for name, arm in masks.items() if name not in by_ratio}
    if not by_ratio:
        raise ValueError(
            f"arms must hold a mask without a threshold or a budget to be ablated by ratio, got {', '.join(masks)}"
        )
    for ratio in ratios:
        for name, arm in by_ratio.items():
            arms[f"{name} {ratio:g}"] = dataclasses.replace(arm, keep_ratios=[ratio])
        for kind in ("magnitude", "random"):
            arms[f"{kind} {ratio:g}"] = make_arm(kind, keep_ratios=[ratio])
    return _derived(study, "ratio", arms=arms)


def layers_study(study: StudyConfig, values: Sequence[str] = ()) -> StudyConfig:
    """Derive a study of the control and every mask on each group of layers, such as 0-3."""
    if not values and study.scratch is None:
        raise ValueError("--values must name groups of layers for this model, such as 0-3,4-7, got none")
    if not values:
        assert study.scratch is not None
        values = [str(layer) for layer in range(study.scratch.layers)]
    arms = _prototypes(study, Full)
    for group in values:
        layers: Any = parse_layers(group)
        for name, arm in {"control": _prototype(study, Control), **_masks(study)}.items():
            arms[f"{name} {group}"] = dataclasses.replace(arm, layers_to_transform=layers)
    return _derived(study, "layers", arms=arms)


def data_study(study: StudyConfig, values: Sequence[str] = ()) -> StudyConfig:
    """Derive a study of fine-tune, control and every MFT arm on shares of the training tokens.

    Each share is a domain; all are evaluated on the same rows. The arms of a share start from its own fine-tune, with
    the number of epochs that validation chooses. If only one number is declared, its double is added.
    """
    shares = [_number(value) for value in values] or list(SHARES)
    domains = {}
    for name, data in study.domains.items():
        if data.max_train_tokens is None:
            raise ValueError(f"domains.{name}.max_train_tokens must be given to take shares of it, got null")
        for share in shares:
            check_rule(0 < share <= 1, "values", "lie in (0, 1]", share)
            tokens = max(data.sequence_length, int(share * data.max_train_tokens))
            domains[f"{name} {share:g}"] = dataclasses.replace(data, max_train_tokens=tokens)
    answers = [name for name in domains if name.rpartition(" ")[0] in study.answers]
    arms = _prototypes(study, Full, Control) | _masks(study)
    full, epochs = str(study.first_of_kind(Full)), sorted(set(arms[str(study.first_of_kind(Full))].epochs))
    if len(epochs) == 1:
        arms[full] = dataclasses.replace(arms[full], epochs=[*epochs, 2 * epochs[0]])
    general = {name: text for name, text in study.general.items() if name not in study.domains}  # domains are renamed
    return _derived(study, "data", arms=arms, domains=domains, answers=answers, general=general)


ABLATIONS: dict[str, Callable[[StudyConfig, Sequence[str]], StudyConfig]] = {
    "ratio": ratio_study,
    "layers": layers_study,
    "data": data_study,
}


def derive(
    study: StudyConfig, what: str, values: Sequence[str] = (), domains: Sequence[str] = (), masks: Sequence[str] = ()
) -> StudyConfig:
    """Derive the ablation ``what`` next to the study, of these domains and mask arms; empty: all."""
    if what not in ABLATIONS:
        raise ValueError(f"the ablation must be one of {', '.join(ABLATIONS)}, got {what!r}{nearest(what, ABLATIONS)}")
    for name in domains:
        if name not in study.domains:
            known = ", ".join(study.domains)
            raise ValueError(f"--domain must be one of {known}, got {name!r}{nearest(name, study.domains)}")
    if domains:
        kept = {name: data for name, data in study.domains.items() if name in domains}
        answers = [name for name in study.answers if name in domains]
        study = dataclasses.replace(study, domains=kept, answers=answers)
    if masks:
        known_masks = _masks(study)
        for name in masks:
            if name not in known_masks:
                known = ", ".join(known_masks)
                raise ValueError(f"--arm must be one of {known}, got {name!r}{nearest(name, known_masks)}")
        study = _remove_arms(study, [name for name in known_masks if name not in masks])
    return ABLATIONS[what](study, values)


@dataclass
class Line:
    """Arms of one kind along what the ablation varies: each value, with the difference from the fine-tune."""

    kind: str
    points: list[tuple[str, Any]] = field(default_factory=list)


def plot_ablation(numbers: Mapping[str, Any], what: str, path: Path) -> None:
    """Plot test loss minus the fine-tune's against what varies, with 95 % intervals. numbers: of a table.json."""
    panels = ablation_lines(numbers, what)
    figure = new_figure(5.2 * len(panels), 3.8)
    for axes, (domain, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        labels = list(dict.fromkeys(label for line in lines.values() for label, _ in line.points))
        colours = {kind: itertools.cycle(own) for kind, own in _COLOURS.items()}
        for offset, (name, line) in enumerate(lines.items()):
            places = [labels.index(label) + 0.06 * offset for label, _ in line.points]
            estimates = [d["estimate"] for _, d in line.points]
            low, high = ([_end(d, end) for _, d in line.points] for end in ("low", "high"))
            errors = [[e - end for e, end in zip(estimates, low)], [end - e for e, end in zip(estimates, high)]]
            colour = next(colours[line.kind])
            axes.errorbar(places, estimates, yerr=errors, fmt="o-", capsize=3, color=colour, label=name)
        axes.axhline(0, color="0.25", linestyle="--", linewidth=1)
        size = {name: max(abs(d["estimate"]) for _, d in line.points) for name, line in lines.items()}
        trained = max((size[name] for name, line in lines.items() if KINDS[line.kind].learns), default=0.0)
        if 0 < 10 * trained < max(size.values()):
            axes.set_yscale("symlog", linthresh=2 * trained)  # random masks are far off
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlabel({"ratio": "keep ratio", "layers": "masked layers", "data": "share of the training data"}[what])
        name, label, _ = min(
            ((name, label, d["estimate"]) for name, line in lines.items() for label, d in line.points),
            key=lambda found: found[2],
        )
        level = len({d["estimate"] for _, d in lines[name].points}) == 1  # it does not depend on what varies
        axes.set_title(
            f"{domain}: {name}{'' if level else f' at {label}'} has the lowest loss", loc="left", fontsize="medium"
        )
        axes.legend()
    figure.supylabel("test loss - loss of the fine-tune\nnats per token (lower is better)", fontsize="medium")
    save_figure(figure, path, dpi=100)


def _end(difference: Mapping[str, Any], end: str) -> float:
    return difference["estimate"] if difference[end] is None else difference[end]


def ablation_lines(numbers: Mapping[str, Any], what: str) -> dict[str, dict[str, Line]]:
    """Return the lines to draw, by panel and by name in the legend."""
    panels: dict[str, dict[str, Line]] = {}
    for domain, table in numbers["domains"].items():
        name, _, share = domain.rpartition(" ")
        lines = panels.setdefault(name if what == "data" else domain, {})
        ratios = [_keep_ratio(row) for row in table["rows"] if KINDS[row["kind"]].is_mft]
        labels = [f"{ratio:g}" for ratio in sorted({ratio for ratio in ratios if ratio is not None})]
        for row in table["rows"]:
            kind, difference = row["kind"], row["minus_full"]
            if kind not in _COLOURS or difference is None:
                continue
            mask = KINDS[kind].is_mft
            if what == "data":
                lines.setdefault(row["arm"], Line(kind)).points.append((share, difference))
                continue
            arm, _, label = row["arm"].rpartition(" ")
            if what == "ratio" and KINDS[kind].learns and _keep_ratio(row) is None:  # a horizontal line
                lines.setdefault(row["arm"] if mask else kind, Line(kind)).points = [
                    (ratio, difference) for ratio in labels
                ]
            else:
                lines.setdefault(arm if mask else kind, Line(kind)).points.append((label, difference))
    return panels


def _keep_ratio(row: Mapping[str, Any]) -> float | None:
    """Return the keep ratio of a row's setting, or None."""
    return None if row["setting"] is None else row["setting"]["keep_ratio"]


def _derived(study: StudyConfig, what: str, **changes: Any) -> StudyConfig:
    return dataclasses.replace(study, output_dir=f"{study.output_dir}-{what}", **changes)


def _prototypes(study: StudyConfig, *kinds: type[Arm]) -> dict[str, Arm]:
    """Return the study's first arm of each kind, under its name in the study."""
    return {str(study.first_of_kind(kind)): _prototype(study, kind) for kind in kinds}


def _masks(study: StudyConfig) -> dict[str, Arm]:
    """Return the study's masks that start at the full fine-tune, where the ablations' controls start too."""
    _prototype(study, Mask)  # raises if there is none
    full = study.first_of_kind(Full)
    return {name: arm for name, arm in study.arms.items() if arm.is_mft and study.start_of(name) == full}


def _remove_arms(study: StudyConfig, arms: Sequence[str]) -> StudyConfig:
    """Return the study without these arms, and without every arm that needs them."""
    kept = (name for name in study.arms if not {name, *study.all_needs(name)}.intersection(arms))
    return dataclasses.replace(study, arms={name: study.arms[name] for name in kept})


def _prototype(study: StudyConfig, kind: type[Arm]) -> Arm:
    name = study.first_of_kind(kind)
    if name is None:
        raise ValueError(f"arms must hold one of kind {name_of(kind)} to be ablated, got {', '.join(study.arms)}")
    return study.arms[name]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--values must be numbers with commas between them, got {text!r}") from None
