"""The paper's ablations as studies: which share is kept, which layers are masked, how much data there is.

Each is a study of its own, derived from a declared one: the same fine-tune, control and grids of rates, chosen on
validation with the first seed, tested with every seed.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mft.choices import nearest
from mft.config import parse_layers
from mft.fields import check_rule
from mft.study.declared import CONTROL, FULL, MASK, ArmConfig, StudyConfig

RATIOS = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
SHARES = (0.1, 0.25, 0.5, 1.0)
_COLOURS = {MASK: "#c1121f", CONTROL: "#e69f00", "magnitude": "#0072b2", "random": "0.5"}


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
    """Fine-tune, control and MFT on a share of the training tokens, each share a domain; evaluated on the same rows."""
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
    return _derived(study, "data", arms=_prototypes(study, FULL, CONTROL, MASK), domains=domains, answers=answers)


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


def plot_ablation(numbers: Mapping[str, Any], what: str, path: Path) -> None:
    """Test loss less the fine-tune's against what varies, from the numbers of a table.json; 95 % intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no global state
    from matplotlib.figure import Figure

    panels = ablation_points(numbers, what)
    figure = Figure(figsize=(5.2 * len(panels), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (domain, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        labels = list(dict.fromkeys(label for points in lines.values() for label, _ in points))
        for offset, (kind, points) in enumerate(lines.items()):
            places = [labels.index(label) + 0.06 * offset for label, _ in points]
            estimates = [d["estimate"] for _, d in points]
            bars = [[d[end] if d[end] is not None else d["estimate"] for _, d in points] for end in ("low", "high")]
            errors = [[e - low for e, low in zip(estimates, bars[0])], [h - e for e, h in zip(estimates, bars[1])]]
            name = "MFT" if kind == MASK else kind
            axes.errorbar(places, estimates, yerr=errors, fmt="o-", capsize=3, color=_COLOURS[kind], label=name)
        axes.axhline(0, color="0.25", linestyle="--", linewidth=1)
        trained = [d["estimate"] for kind in (MASK, CONTROL) for _, d in lines.get(kind, [])]
        if trained and max(abs(e) for points in lines.values() for _, d in points if (e := d["estimate"])) > 10 * max(
            map(abs, trained)
        ):
            axes.set_yscale("symlog", linthresh=2 * max(map(abs, trained)))  # random masks are far off
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlabel({"ratio": "keep ratio", "layers": "masked layers", "data": "share of the training data"}[what])
        axes.set_title(domain, loc="left")
        axes.legend()
    figure.supylabel("test loss - fine-tune's, nats a token", fontsize="medium")
    figure.savefig(path, dpi=100)


def ablation_points(numbers: Mapping[str, Any], what: str) -> dict[str, dict[str, list[tuple[str, Any]]]]:
    """By panel and kind of arm: what varies, and the difference from the fine-tune."""
    panels: dict[str, dict[str, list[tuple[str, Any]]]] = {}
    for domain, table in numbers["domains"].items():
        name, _, share = domain.rpartition(" ")
        lines = panels.setdefault(name if what == "data" else domain, {})
        labels = {row["arm"].rpartition(" ")[2] for row in table["rows"] if row["kind"] == MASK}
        for row in table["rows"]:
            if row["kind"] not in _COLOURS or row["minus_full"] is None:
                continue
            if what == "data":
                lines.setdefault(row["kind"], []).append((share, row["minus_full"]))
            elif what == "ratio" and row["kind"] == CONTROL:  # which has none: a level
                lines[CONTROL] = [(label, row["minus_full"]) for label in sorted(labels, key=float)]
            else:
                lines.setdefault(row["kind"], []).append((row["arm"].rpartition(" ")[2], row["minus_full"]))
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
