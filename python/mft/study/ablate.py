"""The paper's ablations as studies: which share is kept, which layers are masked, how much data there is.

Each is a study of its own, derived from a declared one: the same fine-tune, control and grids of rates, chosen on
validation with the first seed, tested with every seed.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mft.checks import check_rule, nearest
from mft.config import parse_layers
from mft.files.figure import new_figure, save_figure
from mft.study.config import CONTROL, FULL, MASK, ArmConfig, StudyConfig

RATIOS = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
SHARES = (0.1, 0.25, 0.5, 1.0)
_COLOURS = {MASK: ["#c1121f", "#cc79a7", "#56b4e9"], CONTROL: ["#e69f00"], "magnitude": ["#0072b2"], "random": ["0.5"]}


def ratio_study(study: StudyConfig, values: Sequence[str] = ()) -> StudyConfig:
    """A trained, a magnitude and a random mask at every keep ratio."""
    ratios = [_number("values", value) for value in values] or list(RATIOS)
    arms = _prototypes(study, FULL, CONTROL)
    mask = _prototype(study, MASK)
    for ratio in ratios:
        arms[f"MFT {ratio:g}"] = dataclasses.replace(mask, keep_ratios=[ratio])
        for kind in ("magnitude", "random"):
            arms[f"{kind} {ratio:g}"] = ArmConfig(kind, keep_ratios=[ratio])
    return _derived(study, "ratio", arms=arms)


def layers_study(study: StudyConfig, values: Sequence[str] = ()) -> StudyConfig:
    """MFT and the control on each group of layers, such as 0-3."""
    if not values and study.scratch is None:
        raise ValueError("--values must name groups of layers for this model, such as 0-3,4-7, got none")
    if not values:
        assert study.scratch is not None
        values = [str(layer) for layer in range(study.scratch.layers)]
    arms = _prototypes(study, FULL)
    for group in values:
        for kind, name in ((CONTROL, "control"), (MASK, "MFT")):
            layers: Any = parse_layers(group)
            arms[f"{name} {group}"] = dataclasses.replace(_prototype(study, kind), layers_to_transform=layers)
    return _derived(study, "layers", arms=arms)


def data_study(study: StudyConfig, values: Sequence[str] = ()) -> StudyConfig:
    """Fine-tune, control and every MFT on a share of the training tokens, each share a domain; evaluated on the same
    rows.
    """
    shares = [_number("values", value) for value in values] or list(SHARES)
    domains = {}
    for name, data in study.domains.items():
        if data.max_train_tokens is None:
            raise ValueError(f"domains.{name}.max_train_tokens must be given to take shares of it, got null")
        for share in shares:
            check_rule(0 < share <= 1, "values", "lie in (0, 1]", share)
            tokens = max(data.sequence_length, int(share * data.max_train_tokens))
            domains[f"{name} {share:g}"] = dataclasses.replace(data, max_train_tokens=tokens)
    answers = [name for name in domains if name.rpartition(" ")[0] in study.answers]
    arms = _prototypes(study, FULL, CONTROL, MASK)
    arms |= {name: arm for name, arm in study.arms.items() if arm.kind == MASK}
    general = {name: text for name, text in study.general.items() if name not in study.domains}  # those have new names
    return _derived(study, "data", arms=arms, domains=domains, answers=answers, general=general)


ABLATIONS: dict[str, Callable[[StudyConfig, Sequence[str]], StudyConfig]] = {
    "ratio": ratio_study,
    "layers": layers_study,
    "data": data_study,
}


def derive(study: StudyConfig, what: str, values: Sequence[str] = (), domains: Sequence[str] = ()) -> StudyConfig:
    """The ablation of this name, on some of the study's domains (all, if none is named); it stands beside the study."""
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
    return ABLATIONS[what](study, values)


@dataclass
class Line:
    """Arms of one kind that differ in what varies: its values, and the difference from the fine-tune at each."""

    kind: str
    points: list[tuple[str, Any]] = field(default_factory=list)


def plot_ablation(numbers: Mapping[str, Any], what: str, path: Path) -> None:
    """Test loss less the fine-tune's against what varies, from the numbers of a table.json; 95 % intervals."""
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
        trained = max((size[name] for name, line in lines.items() if line.kind in (MASK, CONTROL)), default=0.0)
        if 0 < 10 * trained < max(size.values()):
            axes.set_yscale("symlog", linthresh=2 * trained)  # random masks are far off
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlabel({"ratio": "keep ratio", "layers": "masked layers", "data": "share of the training data"}[what])
        axes.set_title(domain, loc="left")
        axes.legend()
    figure.supylabel("test loss - fine-tune's, nats a token", fontsize="medium")
    save_figure(figure, path, dpi=100)


def _end(difference: Mapping[str, Any], end: str) -> float:
    return difference["estimate"] if difference[end] is None else difference[end]


def ablation_lines(numbers: Mapping[str, Any], what: str) -> dict[str, dict[str, Line]]:
    """By panel and name in the legend."""
    panels: dict[str, dict[str, Line]] = {}
    for domain, table in numbers["domains"].items():
        name, _, share = domain.rpartition(" ")
        lines = panels.setdefault(name if what == "data" else domain, {})
        labels = {row["arm"].rpartition(" ")[2] for row in table["rows"] if row["kind"] == MASK}
        for row in table["rows"]:
            kind, difference = row["kind"], row["minus_full"]
            if kind not in _COLOURS or difference is None:
                continue
            if what == "data":
                lines.setdefault(row["arm"], Line(kind)).points.append((share, difference))
                continue
            line = lines.setdefault("MFT" if kind == MASK else kind, Line(kind))
            if what == "ratio" and kind == CONTROL:  # which has none: a level
                line.points = [(label, difference) for label in sorted(labels, key=float)]
            else:
                line.points.append((row["arm"].rpartition(" ")[2], difference))
    return panels


def _derived(study: StudyConfig, what: str, **changes: Any) -> StudyConfig:
    return dataclasses.replace(study, output_dir=f"{study.output_dir}-{what}", **changes)


def _prototypes(study: StudyConfig, *kinds: str) -> dict[str, ArmConfig]:
    """The study's first arm of each kind, under the name that it has there."""
    return {str(study.named(kind)): _prototype(study, kind) for kind in kinds}


def _prototype(study: StudyConfig, kind: str) -> ArmConfig:
    name = study.named(kind)
    if name is None:
        raise ValueError(f"arms must hold one of kind {kind} to be ablated, got {', '.join(study.arms)}")
    return study.arms[name]


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--{name} must be numbers with commas between them, got {text!r}") from None
