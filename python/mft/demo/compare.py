"""Mask fine-tuning against honest baselines: chosen on validation alone, test opened once, differences paired.

base            before the full fine-tune
full fine-tune  where all that follow start
control         the masked layers' weights, trained on for as many steps as the masks: what MFT must beat
random mask     the same share of weights kept, drawn at random
magnitude mask  the same share kept, the largest
MFT             the trained mask
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import nn

from mft.config import MaskConfig, TrainConfig
from mft.data.splits import Splits
from mft.demo.tuning import Trial, tune
from mft.evaluation.evaluate import Evaluation
from mft.masks.convert import mask_model, masked_modules
from mft.models.causal_lm import clone_with_own_weights, first_trainable_layer
from mft.models.frozen_layers import PrefixMemory
from mft.training.loop import train_masks, train_weights
from mft.training.metrics import Recorder

ARMS = BASE, FULL, CONTROL, RANDOM, MAGNITUDE, MFT = (
    "base",
    "full fine-tune",
    "control",
    "random mask",
    "magnitude mask",
    "MFT",
)


@dataclass
class Comparison:
    """Test evaluations by arm, how their configurations were chosen, and the mask-trained model."""

    arms: dict[str, Evaluation]
    trials: list[Trial]
    masked: nn.Module
    start_loss: float  # of the full fine-tune on validation
    notes: list[str] = field(default_factory=list)

    def chosen_lr(self, arm: str) -> float | None:
        """The rate of the arm's best trial; None if the arm was not tuned."""
        best = min((t for t in self.trials if t.arm == arm), key=lambda t: t.validation_loss, default=None)
        return None if best is None else best.lr


def compare(
    model: nn.Module,
    splits: Splits,
    mask: MaskConfig,
    train: TrainConfig,
    *,
    mask_lrs: Sequence[float],
    control_lrs: Sequence[float],
    base: nn.Module | None = None,
    extensions: int = 2,
    recorder: Recorder | None = None,
) -> Comparison:
    """Train masks and the control on splits.train, choose each arm's rate on validation, evaluate all arms on test.

    Args:
        model: the fully fine-tuned model; left unchanged. Its weights are shared by the arms.
        train: of both arms; its lr is replaced by each of mask_lrs and control_lrs in turn.
        base: the model before its full fine-tune, if it is to be shown.
        extensions: how many further rates an arm may try while its best is the smallest or largest (see tune).
    """
    if not mask_lrs or not control_lrs:
        raise ValueError(
            f"mask_lrs and control_lrs must each hold a rate, got {list(mask_lrs)} and {list(control_lrs)}"
        )
    recorder = recorder or Recorder()
    model.requires_grad_(False)
    trained = mask_model(clone_with_own_weights(model), mask)
    names, first = list(masked_modules(trained)), first_trainable_layer(trained)
    memories = {split: PrefixMemory() for split in ("train", "validation", "test")}

    def attempt(arm: str, lr: float) -> tuple[nn.Module, float]:
        candidate = clone_with_own_weights(model, names if arm == CONTROL else ())
        phase = f"{arm}, lr {lr:g}"
        with recorder.training(phase, splits.train, train) as on_step:
            options: dict[str, Any] = {"memory": memories["train"], "on_step": on_step}
            if arm == CONTROL:
                train_weights(candidate, names, splits.train, replace(train, lr=lr), **options)
            else:
                mask_model(candidate, mask)
                train_masks(candidate, splits.train, replace(train, lr=lr), **options)
        return candidate, on_validation(phase, candidate)

    def on_validation(phase: str, candidate: nn.Module) -> float:
        return recorder.evaluate(
            f"{phase}, validation", candidate, splits.validation, first=first, memory=memories["validation"]
        ).loss

    start_loss = on_validation(FULL, model)
    tuned = {
        arm: tune(arm, lrs, partial(attempt, arm), extensions) for arm, lrs in ((CONTROL, control_lrs), (MFT, mask_lrs))
    }
    models = {
        FULL: model,
        CONTROL: tuned[CONTROL].model,
        RANDOM: mask_model(clone_with_own_weights(model), replace(mask, init="normal")),
        MAGNITUDE: mask_model(clone_with_own_weights(model), replace(mask, init="magnitude")),
        MFT: tuned[MFT].model,
    }
    arms = {}
    if base is not None:
        arms[BASE] = recorder.evaluate(f"{BASE}, test", base, splits.test)
    for arm, candidate in models.items():
        arms[arm] = recorder.evaluate(f"{arm}, test", candidate, splits.test, first=first, memory=memories["test"])
    trials = [trial for found in tuned.values() for trial in found.trials]
    notes = [note for found in tuned.values() for note in found.notes]
    return Comparison(arms, trials, models[MFT], start_loss, notes)
