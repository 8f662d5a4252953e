"""What makes a mask better than training on: variants of mask training against a tuned control, on validation.

    python -m benchmarks.mask_variants --base DIR [--situation tuned] [--seeds 0,1] [--only window,noise] [--log FILE]

With the first seed every variant tries three rates, its own and those a factor of 2 beside it, and a control seven, for
two lengths; further seeds run at what the first one chose. Runs are appended to a log and not repeated; --table ranks
what it holds and writes benchmarks/results/mask_variants-cpu.json. No test split is opened.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from benchmarks.harness import RESULTS, environment
from benchmarks.mask_variants.ground import Ground, Log, Situation, Tried
from benchmarks.mask_variants.rules import (
    FreeThreshold,
    GradientSigmoid,
    GradientWindow,
    KeepSchedule,
    PullToStart,
    Rule,
    ScoreAverage,
    ScoreNoise,
    SlowThreshold,
    Start,
)
from mft.config import DataConfig, TrainConfig
from mft.evaluation.evaluate import paired_difference
from mft.importance.scores import initialise_scores

START, CONTROL = "fine-tune", "control"
CONTROL_RATES = (1e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
LONGER = (1.0, 2.0)  # of the control; masks have variants of their own for that
BESIDE = (0.5, 1.0, 2.0)  # times a variant's own rate


@dataclass(frozen=True)
class Variant:
    """One way of training a mask; rules are made anew for every run."""

    name: str
    hypothesis: str
    keep_ratio: float
    lr: float  # the middle one of three
    rules: Callable[[Ground], list[Rule]] = field(default=lambda ground: [])
    init: str = "normal"
    longer: float = 1.0  # times the situation's epochs
    train: Callable[[TrainConfig], TrainConfig] = field(default=lambda train: train)


def situations(base: str, source: str, full_lr: float, full_epochs: float) -> dict[str, Situation]:
    """What masks meet; masks and control in the upper half of the layers but in the last two.

    tuned: rows, batch, and fine-tune of the small study, whose rate and epochs validation liked best there. more: four
    times the rows. overfitted: three times the epochs. all, lower: tuned with other layers.
    """
    full = TrainConfig(lr=full_lr, epochs=full_epochs, batch_size=8, betas=(0.9, 0.99))
    data = DataConfig(source=source, sequence_length=256, max_train_tokens=65536, max_eval_tokens=32768)
    depth = AutoConfig.from_pretrained(base).num_hidden_layers
    upper, lower = tuple(range(depth // 2, depth)), tuple(range(depth // 2))
    tuned = Situation("", base, data, upper, full, epochs=2.0)
    found = {
        "tuned": tuned,
        "more": replace(tuned, data=replace(data, max_train_tokens=4 * 65536)),
        "overfitted": replace(tuned, full=replace(full, epochs=3 * full_epochs)),
        "all": replace(tuned, layers=None),
        "lower": replace(tuned, layers=lower),
    }
    return {name: replace(situation, name=f"{Path(source).stem}, {name}") for name, situation in found.items()}


def _gradient_start(ground: Ground) -> Callable[[nn.Module], None]:
    return lambda model: initialise_scores(model, "gradient", ground.splits.train)


def _betas(*betas: float) -> Callable[[TrainConfig], TrainConfig]:
    return lambda train: replace(train, betas=betas)


def _batch(size: int) -> Callable[[TrainConfig], TrainConfig]:
    return lambda train: replace(train, batch_size=size)


KEEP, RATE = 0.9, 2e-3  # of the plain variant that the others change in one thing


def _changed(name: str, hypothesis: str, *rules: Callable[[], Rule], **changes: Any) -> Variant:
    """The plain variant with rules added, or with other values of its fields."""
    plain = Variant(name, hypothesis, KEEP, RATE, lambda ground: [rule() for rule in rules])
    return replace(plain, **changes)


# What is tried together with what else helped, after each had been tried alone.
TOGETHER: list[tuple[str, list[Callable[[], Rule]], dict[str, Any]]] = [
    ("free threshold", [FreeThreshold], {"keep_ratio": 1.0}),
    ("constant", [], {"init": "constant"}),
]
# The same freedom for the control.
CONTROLS: dict[str, Callable[[TrainConfig], TrainConfig]] = {
    CONTROL: lambda train: train,
    f"{CONTROL}, betas 0, 0.99": _betas(0.0, 0.99),
    f"{CONTROL}, batch 2": _batch(2),
}

VARIANTS = [
    *(_changed(f"normal, keep {keep:g}", "the paper's scores", keep_ratio=keep) for keep in (0.8, 0.9, 0.95, 0.98)),
    *(
        _changed(f"magnitude, keep {keep:g}", "no harm at first", keep_ratio=keep, init="magnitude")
        for keep in (0.8, 0.9, 0.98, 0.995)
    ),
    *(
        _changed(
            f"constant, keep {keep:g}",
            "ties keep all at first: begins at the fine-tune",
            keep_ratio=keep,
            init="constant",
        )
        for keep in (0.8, 0.9, 0.98)
    ),
    *(
        _changed(
            f"gradient start, keep {keep:g}",
            "training goes on from the best one-shot mask",
            keep_ratio=keep,
            rules=lambda ground: [Start(_gradient_start(ground))],
        )
        for keep in (0.9, 0.995)
    ),
    *(
        _changed(
            f"keep 1 to {KEEP:g}, power {power:g}",
            "scores learn before they must drop",
            partial(KeepSchedule, KEEP, power),
            keep_ratio=1.0,
        )
        for power in (1, 3)
    ),
    *(
        _changed(f"window {width:g}", "scores far from the cut should not drift", partial(GradientWindow, width))
        for width in (1.0, 4.0)
    ),
    _changed("sigmoid 1", "the same, smoothly", partial(GradientSigmoid, 1.0)),
    *(
        _changed(f"noise {deviation:g}", "drops that survive noise generalise", partial(ScoreNoise, deviation))
        for deviation in (0.1, 0.3)
    ),
    _changed("average 0.1", "the mean of late scores is less noisy", partial(ScoreAverage, 0.1)),
    _changed("slow threshold", "a cut that follows slowly", partial(SlowThreshold, 0.95)),
    _changed("average and slow threshold", "both", partial(SlowThreshold, 0.95), partial(ScoreAverage, 0.1)),
    *(
        _changed(f"pull {strength:g}", "only lasting evidence should flip a weight", partial(PullToStart, strength))
        for strength in (0.01, 0.05)
    ),
    _changed("free threshold", "begin at the fine-tune, drop what asks for it", FreeThreshold, keep_ratio=1.0),
    _changed(
        "free threshold, level",
        "the same, whatever the weight's size",
        partial(FreeThreshold, level=True),
        keep_ratio=1.0,
    ),
    *(_changed(f"betas {a:g}, {b:g}", "Adam's memory", train=_betas(a, b)) for a, b in ((0.0, 0.99), (0.98, 0.999))),
    *(_changed(f"batch {size}", "fewer, surer steps; or more, noisier ones", train=_batch(size)) for size in (2, 32)),
    *(
        _changed(
            f"{name}, betas 0, 0.99",
            "what helped, together: no momentum",
            *rules,
            lr=2 * RATE,
            train=_betas(0.0, 0.99),
            **changes,
        )
        for name, rules, changes in TOGETHER
    ),
    *(
        _changed(
            f"{name}, betas 0, 0.99, batch 2",
            "what helped, together: no momentum, more steps",
            *rules,
            lr=2 * RATE,
            train=lambda train: replace(train, betas=(0.0, 0.99), batch_size=2),
            **changes,
        )
        for name, rules, changes in TOGETHER
    ),
    *(
        _changed(
            f"{name}, betas 0, 0.99, {times:g} times as long",
            "what helped, together: no momentum, more epochs",
            *rules,
            lr=2 * RATE,
            longer=times,
            train=_betas(0.0, 0.99),
            **changes,
        )
        for name, rules, changes in TOGETHER
        for times in (2.0, 4.0)
    ),
    *(
        _changed(
            f"normal, keep {keep:g}, 2 times as long",
            "masks need steps, and do not overfit",
            keep_ratio=keep,
            longer=2.0,
        )
        for keep in (0.8, 0.9)
    ),
]


def search(ground: Ground, variant: Variant) -> None:
    """Three rates with this ground's seed."""
    for lr in (float(f"{times * variant.lr:.4g}") for times in BESIDE):
        if not ground.log.find(situation=ground.situation.name, variant=variant.name, seed=ground.seed, lr=lr):
            _run(ground, variant, lr)


def _run(ground: Ground, variant: Variant, lr: float) -> None:
    epochs, rules = variant.longer * ground.situation.epochs, variant.rules(ground)
    changes: dict[str, Any] = {"init": variant.init, "train": variant.train}
    _say(ground, ground.masks(variant.name, lr, epochs, variant.keep_ratio, rules, **changes))


def control(ground: Ground, name: str) -> None:
    """Every rate, for as many epochs as masks get, and for twice as many."""
    for epochs in (longer * ground.situation.epochs for longer in LONGER):
        for lr in CONTROL_RATES:
            known = {"situation": ground.situation.name, "variant": name, "seed": ground.seed}
            if not ground.log.find(**known, lr=lr, epochs=epochs):
                _say(ground, ground.weights(name, lr, epochs, CONTROLS[name]))


def _say(ground: Ground, run: Tried) -> None:
    start = ground.log.find(situation=run.situation, variant="fine-tune", seed=run.seed)[0]
    mean, error = paired_difference(run.evaluation(), start.evaluation())
    flips = "" if run.flips is None else f"flips {100 * run.flips:.2f} % kept {run.kept:.4f}"
    print(
        f"{run.situation} s{run.seed} {run.variant:30} lr {run.lr} x {run.epochs} keep {run.keep_ratio}: "
        f"{run.loss:.4f} {mean:+.5f} +- {error:.5f} {flips} ({run.seconds:.0f} s)",
        flush=True,
    )


@dataclass(frozen=True)
class Ranked:
    """A variant at its best setting of the first seed; differences are means over seeds, with the documents' error."""

    situation: str
    variant: str
    hypothesis: str
    lr: float | None
    epochs: float | None
    keep_ratio: float | None
    kept: float | None
    flips: float | None
    seeds: int
    tried: int
    from_finetune: float
    from_finetune_error: float
    from_control: float
    from_control_error: float


def ranked(log: Log, situation: str) -> list[Ranked]:
    """Best first. Each seed is paired with its own fine-tune, and with its own run of the best control."""
    hypotheses = {variant.name: variant.hypothesis for variant in VARIANTS}
    runs = log.find(situation=situation)
    best: dict[str, Tried] = {}
    first = min(run.seed for run in runs)
    for run in runs:
        if run.seed == first and (run.variant not in best or run.loss < best[run.variant].loss):
            best[run.variant] = run
    rows = []
    references = {START: best[START], CONTROL: min((best[name] for name in CONTROLS if name in best), key=_loss)}
    for name, chosen in best.items():
        same = [r for r in runs if (r.variant, r.lr, r.epochs, r.keep_ratio) == _setting(chosen)]
        pairs = {
            against: [_difference(run, _match(runs, reference, run.seed)) for run in same]
            for against, reference in references.items()
        }
        tried = sum(run.variant == name and run.seed == first for run in runs)
        rows.append(
            Ranked(
                situation,
                name,
                hypotheses.get(name, ""),
                chosen.lr,
                chosen.epochs,
                chosen.keep_ratio,
                chosen.kept,
                chosen.flips,
                len(same),
                tried,
                *_mean(pairs[START]),
                *_mean(pairs[CONTROL]),
            )
        )
    return sorted(rows, key=lambda row: row.from_finetune)


def _loss(run: Tried) -> float:
    return run.loss


def _setting(run: Tried) -> tuple:
    return run.variant, run.lr, run.epochs, run.keep_ratio


def _match(runs: list[Tried], chosen: Tried, seed: int) -> Tried:
    return next(run for run in runs if run.seed == seed and _setting(run) == _setting(chosen))


def _difference(run: Tried, other: Tried) -> tuple[float, float]:
    return paired_difference(run.evaluation(), other.evaluation())


def _mean(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    """Seeds share the documents, so their errors do not fall with the number of seeds: the mean error is kept."""
    means, errors = zip(*pairs, strict=True)
    return sum(means) / len(means), sum(errors) / len(errors)


def main() -> None:
    """Search, then print the ranking, or store it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="run nothing, but store the ranking of what the log holds")
    parser.add_argument("--base", help="directory of a model that was trained beforehand")
    parser.add_argument("--source", default="headers", help="data of the fine-tune, as of data.source")
    parser.add_argument("--full-lr", type=float, default=4e-3, help="of the fine-tune")
    parser.add_argument("--full-epochs", type=float, default=4.0)
    parser.add_argument("--situation", default="tuned", help="tuned, more, overfitted, all or lower")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--only", default="", help="parts of variants' names, separated by ';'; control; none")
    parser.add_argument("--log", type=Path, default=Path("runs/mask_variants.jsonl"))
    options = parser.parse_args()
    if options.base is None and not options.table:
        parser.error("--base must name a model's directory, got none: mft compare --config small makes one, base/")
    torch.set_num_threads(1)
    log = Log(options.log)
    if not options.table:
        _search_all(log, options)
    rows = [row for name in sorted({run.situation for run in log.runs}) for row in ranked(log, name)]
    for row in rows:
        print(
            f"{row.situation:16} {row.variant:34} {row.from_finetune:+.5f} +- {row.from_finetune_error:.5f} "
            f"{row.from_control:+.5f} +- {row.from_control_error:.5f} of {row.tried}, {row.seeds} seeds"
        )
    if options.table:
        title = "Ways of training masks against a tuned control; validation loss, nats a token, ± one standard error"
        record = {"title": title, "environment": environment(), "rows": [asdict(row) for row in rows]}
        (RESULTS / "mask_variants-cpu.json").write_text(json.dumps(record, indent=1) + "\n")


def _search_all(log: Log, options: argparse.Namespace) -> None:
    declared = situations(options.base, options.source, options.full_lr, options.full_epochs)
    situation, models = declared[options.situation], options.log.parent / "fine-tuned"
    parts = [part for part in options.only.split(";") if part]
    wanted = [v for v in VARIANTS if not parts or any(part in v.name for part in parts)]
    first, *others = map(int, options.seeds.split(","))
    ground = Ground(situation, first, log, models)
    for name in CONTROLS:
        if not parts or name in parts or name == CONTROL:  # which every row is paired with
            control(ground, name)
    for variant in wanted:
        search(ground, variant)
    for seed in others:
        confirm(Ground(situation, seed, log, models), wanted, first)


def confirm(ground: Ground, variants: list[Variant], first: int) -> None:
    """Control and variants with another seed, at the settings that the first seed chose."""
    name = ground.situation.name
    best = min(
        (run for control in CONTROLS for run in ground.log.find(situation=name, variant=control, seed=first)), key=_loss
    )
    if not ground.log.find(situation=name, variant=best.variant, seed=ground.seed):
        assert best.lr is not None
        assert best.epochs is not None
        _say(ground, ground.weights(best.variant, best.lr, best.epochs, CONTROLS[best.variant]))
    for variant in variants:
        runs = ground.log.find(situation=name, variant=variant.name, seed=first)
        chosen = min(runs, key=_loss, default=None)
        if chosen is not None and not ground.log.find(situation=name, variant=variant.name, seed=ground.seed):
            assert chosen.lr is not None
            _run(ground, variant, chosen.lr)


if __name__ == "__main__":
    main()
