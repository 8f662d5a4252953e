"""Search which mask under a budget learns most: by ramp, start, mode, steps, one budget or a share of each matrix.

    python -m benchmarks.regimes.budget_search [--out runs/budget-search]     an estimated half hour on two cores
    python -m benchmarks.regimes.budget_search --quick                        minutes; not for the record

A small Llama, trained from scratch on Python's library, learns C++ headers. Every variant drops 0.6 % of the weights.
Only validation is used: a search chooses what studies later compare on unread texts.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mft.config import DataConfig, MaskConfig, TrainConfig
from mft.data.splits import Splits, load_splits
from mft.masks.convert import masked_modules
from mft.masks.inspection import kept_weights
from mft_study.arms.masks import Mask
from mft_study.evidence.power import Spread

from ..tables import markdown
from .arms import ground_of
from .findings import Documents, compared, interval, nats_of
from .runs import CHOICE, SECONDS, Found, Regime, Run, best_rate, chosen_runs, load_base, quick_scratch, run_command

NATS, BYTES, DROPPED, LOSS, TEXT = "nats", "bytes", "dropped", "validation loss", "headers"
SHARE = 0.006  # dropped share of the weights
USUAL = "usual"
_RATES = [8e-3, 1.6e-2]
# Differences from the usual budget: a ramp over 0.67 of the steps, the magnitude start, mode "value" and beta1 = 0.
VARIANTS: dict[str, dict[str, Any]] = {
    USUAL: {},
    "no ramp": {"budget_ramp": 0.0},
    "ramp over a third": {"budget_ramp": 0.33},
    "ramp to the end": {"budget_ramp": 1.0},
    "magnitude mode": {"mode": "magnitude"},
    "constant start": {"init": "constant"},
    "wanda start": {"init": "wanda"},
    "beta1 0.9": {"betas": (0.9, 0.99)},
    "half the steps": {"epochs": [2]},
    "twice the steps": {"epochs": [8]},
    "share of each matrix": {"budget": None, "fill_budget": None},
}


def mask_arm(variant: str, lrs: list[float]) -> Mask:
    usual: dict[str, Any] = {"mode": "value", "budget": SHARE, "fill_budget": True, "epochs": [4], "lrs": lrs}
    values = usual | VARIANTS[variant]
    return Mask("mask", **values)


def _train() -> TrainConfig:
    return TrainConfig(epochs=1.0, batch_size=8, betas=(0, 0.99))


@dataclass(frozen=True)
class BudgetSearch(Regime):
    """A search over the variants that rates names."""

    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=_train)  # rate, epochs and seed are set for each run

    assumed = Spread(0.005, 0.05, "a guess")

    def splits(self, tokenizer: Any, seed: int) -> Splits:
        return load_splits(dataclasses.replace(self.data, seed=seed), tokenizer)

    def run(self, base: Path, run: Run) -> Found:
        """Return NATS: each validation document's; BYTES: the coded masks'; DROPPED: share of the weights."""
        model, tokenizer = load_base(base)
        splits, arm = self.splits(tokenizer, run.seed), mask_arm(run.arm, self.rates[run.arm])
        ground = ground_of(model, arm, run, MaskConfig(keep_ratio=1 - SHARE))  # a budget overrides keep_ratio
        ground = dataclasses.replace(ground, rows=lambda: splits.train)
        betas = arm.betas or self.train.betas
        train = dataclasses.replace(self.train, lr=run.lr, seed=run.seed, epochs=arm.epochs[0], betas=betas)
        trained = arm.untrained(ground)
        arm.train(trained, ground, splits.train, train)
        nats = nats_of(trained, splits.validation)
        kept = kept_weights([module.packed_mask() for module in masked_modules(trained).values()])
        dropped = 1 - kept / ground.numbers()
        return {CHOICE: sum(nats), NATS: {TEXT: nats}, BYTES: arm.stored_bytes(ground, trained), DROPPED: dropped}

    def tests(self, tokenizer: Any) -> dict[str, Any]:
        """Return the validation documents: no search opens the test files."""
        return {TEXT: self.splits(tokenizer, self.seeds[0]).validation}

    def arms(self, found: dict[Run, Found], documents: Documents) -> dict[str, Any]:
        """Return the mean validation loss, and its difference from the usual budget."""
        runs = {arm: chosen_runs(self, found, arm) for arm in self.rates}
        nats = {arm: {seed: one[NATS] for seed, one in own.items()} for arm, own in runs.items()}
        differences = compared(nats, USUAL, documents)
        return {
            arm: {
                "lr": best_rate(self, found, arm),
                LOSS: float(np.mean([documents.mean_loss(one) for one in nats[arm].values()])),
                f"{LOSS} - {USUAL}": differences.get(arm),
            }
            | {name: float(np.mean([one[name] for one in own.values()])) for name in (BYTES, SECONDS)}
            for arm, own in runs.items()
        }

    def table(self, arms: dict[str, Any]) -> str:
        rows = []
        for arm, one in sorted(arms.items(), key=lambda item: item[1][LOSS]):
            numbers = [f"{one['lr']:g}", f"{one[LOSS]:.4f}", interval(one[f"{LOSS} - {USUAL}"])]
            rows.append([arm, *numbers, f"{one[BYTES]:,.0f}", f"{one[SECONDS]:.0f}"])
        return "\n\n".join(
            [
                "# Masks under a budget",
                f"Loss on validation, nats per token; {len(self.seeds)} seeds; 95 % intervals; * where p < 0.05 after "
                "Holm's correction over the variants.",
                markdown(["variant", "rate", "loss", f"- {USUAL}", BYTES, "s per run"], rows),
            ]
        )


def declare(texts: Path, *, quick: bool) -> BudgetSearch:
    """Declare the search; quick: a small model, little text, two seeds, one rate. texts is not used."""
    data = DataConfig(source="headers", sequence_length=256, max_train_tokens=32_768, max_eval_tokens=16_384)
    if quick:
        small = dataclasses.replace(data, max_train_tokens=8_192, max_eval_tokens=8_192)
        rates = {variant: _RATES[1:] for variant in VARIANTS}
        return BudgetSearch(rates=rates, seeds=[0, 1], scratch=quick_scratch(), extensions=0, data=small)
    return BudgetSearch(rates=dict.fromkeys(VARIANTS, _RATES), seeds=[0, 1, 2], extensions=1, data=data)


if __name__ == "__main__":
    run_command(__doc__, "budget_search", declare)
