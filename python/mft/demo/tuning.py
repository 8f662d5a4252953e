"""A rate chosen on the validation split: a grid that grows while its best rate is its smallest or largest."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from mft.training.loop import NonFiniteLoss


@dataclass
class Trial:
    """One configuration that was trained and seen by the validation split."""

    arm: str
    lr: float
    validation_loss: float  # infinite if training diverged


@dataclass
class Tuned:
    """The best model of an arm, all its trials, and what a reader must know of the choice."""

    model: nn.Module
    trials: list[Trial]
    notes: list[str]


def tune(arm: str, lrs: Sequence[float], attempt: Callable[[float], tuple[nn.Module, float]], extensions: int) -> Tuned:
    """Try each of lrs, then up to ``extensions`` further ones while the best lies at an end of what was tried.

    Args:
        attempt: lr -> (trained model, validation loss). A NonFiniteLoss of one rate is noted, not passed on.
    Raises: NonFiniteLoss if every rate diverges.
    """
    waiting, losses, notes = sorted(set(lrs)), dict[float, float](), list[str]()
    best: nn.Module | None = None
    while waiting:
        lr = waiting.pop(0)
        try:
            candidate, loss = attempt(lr)
        except NonFiniteLoss as error:
            notes.append(f"{arm}, lr {lr:g}: {error}")
            loss = math.inf
        else:
            if loss < min(losses.values(), default=math.inf):
                best = candidate
        losses[lr] = loss
        if not waiting and extensions > 0 and (further := _beyond_the_end(losses)) is not None:
            waiting, extensions = [further], extensions - 1
    if best is None:
        raise NonFiniteLoss(f"{arm} must train at one of the rates {sorted(losses)}, got a non-finite loss at each")
    trials = [Trial(arm, lr, loss) for lr, loss in losses.items()]
    return Tuned(best, trials, notes + _notes_on_the_grid(arm, losses))


def _beyond_the_end(losses: dict[float, float]) -> float | None:
    """The next rate in the grid's ratio if the best one is at an end; None if it lies inside."""
    rates = sorted(losses)
    best = min(rates, key=losses.__getitem__)
    if len(rates) < 2 or best not in (rates[0], rates[-1]):
        return None
    return float(f"{best * (rates[0] / rates[1] if best == rates[0] else rates[-1] / rates[-2]):.3g}")


def _notes_on_the_grid(arm: str, losses: dict[float, float]) -> list[str]:
    rates = sorted(losses)
    best = min(rates, key=losses.__getitem__)
    if len(rates) < 3:
        return [f"{arm}: only {len(rates)} rate(s) tried, at least 3 make a fair choice"]
    if best in (rates[0], rates[-1]):
        end = "smallest" if best == rates[0] else "largest"
        return [f"{arm}: the best rate, {best:g}, is the {end} of those tried; a wider grid may find a better one"]
    return []
