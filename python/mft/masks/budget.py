"""A budget: at most a share of all masked weights of a model is dropped, those with the smallest scores in any layer.

    quota     = share * weights, reached after the fraction ``ramp`` of a run's steps; it grows linearly from 0
    threshold = the (quota + 1)-th smallest score over all layers together, or 0 if that is less
    keep      = score >= threshold, in every layer

So a weight is dropped only once its score is below 0. A budget that is filled has no such bound: quota weights are
dropped. In mode "magnitude", |score| takes the place of the score and budgets are always filled.

The threshold is found again after each optimiser step. Between two steps it is a fixed threshold of every layer.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from mft.checks import check_rule
from mft.config import MaskConfig
from mft.models.attached import attached
from mft.models.parallel import unwrapped
from mft_kernels import MaskedLayer
from mft_kernels.internal import (
    AddUp,
    NonFiniteScores,
    Scores,
    State,
    one_process,
    shared_threshold,
    state,
    still,
    watch,
)

_SCALE = 0.02  # root mean square of initial scores, as in MaskedLinear


@dataclass
class Budget:
    """The budget of one model.

    share: the share of its masked ``weights`` to drop. quota: the number of weights that may be dropped now; before the
    first grow() it is the whole budget. fills: whether the quota is dropped whatever the signs of the scores.
    """

    share: float
    ramp: float
    mode: str
    weights: int
    fills: bool
    quota: int = field(init=False)

    def __post_init__(self) -> None:
        self.grow(1, 1)
        least = f"be at least {1 / self.weights:.2g}, one of the {self.weights} masked weights"
        check_rule(self.quota > 0, "budget", least, self.share)

    def grow(self, step: int, steps: int) -> None:
        """Set the quota that holds after ``step`` of ``steps``. After step 0 it is 0, unless there is no ramp."""
        ramp = self.ramp * steps
        self.quota = int(self.share * self.weights * (1.0 if step >= ramp else step / ramp))

    def threshold(self, read: Callable[[], Iterable[Tensor]], add_up: AddUp = one_process) -> float:
        """Return the threshold that drops the quota, or less unless the budget fills. read: see shared_threshold."""
        found = shared_threshold(read, self.quota, mode=self.mode, add_up=add_up)
        return found if self.fills else min(found, 0.0)

    def select(self, masked: Sequence[MaskedLayer]) -> None:
        """Give all layers the threshold that their scores share now. Raises: NonFiniteScores, which names the layer."""
        with name_layer(masked):
            threshold = self.threshold(lambda: (module.scores for module in masked))
        for module in masked:
            module.move_threshold(threshold)


@contextlib.contextmanager
def name_layer(masked: Iterable[MaskedLayer]) -> Iterator[None]:
    """Let a NonFiniteScores error that is raised in this context name the layer."""
    try:
        yield
    except NonFiniteScores:
        for module in masked:
            module.current_mask()  # raises NonFiniteScores, which names the layer
        raise


class SharedThreshold:
    """The threshold of an adapter's layers in PEFT. It is computed again when the scores or the quota have changed.

    Any loop may train the scores, and PEFT replaces them when it loads, so each layer asks in each forward.
    Args: scores: returns the present scores of all layers by name.
    """

    def __init__(self, budget: Budget, scores: Callable[[], dict[str, nn.Parameter]]) -> None:
        self.budget, self._scores = budget, scores
        self._found: _Found | None = None

    def value(self, asking: Tensor, *, look_at_all: bool = False) -> float:
        """Return the threshold for the layer with these scores. Raises: NonFiniteScores, which names the layer.

        look_at_all: check the scores of every layer for changes. This is too slow for each forward.
        """
        found, quota = self._found, self.budget.quota
        asked = self._scores().values() if look_at_all else [asking]
        if found is None or found.quota != quota or not all(map(found.holds_for, asked)):
            found = self._found = self._find(self._scores(), quota)
        return found.threshold

    def _find(self, scores: dict[str, nn.Parameter], quota: int) -> "_Found":
        for each in scores.values():
            watch(each)
        states = {id(each): (each, state(cast(Scores, each))) for each in scores.values()}
        try:
            return _Found(self.budget.threshold(scores.values), quota, states)
        except NonFiniteScores:
            name = next(name for name, each in scores.items() if not each.isfinite().all())
            raise NonFiniteScores(scores[name].detach(), name) from None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_found": None}  # states are only valid in this process


@dataclass(frozen=True)
class _Found:
    """A threshold, with the quota and the states of the scores for which it was computed."""

    threshold: float
    quota: int
    states: Mapping[int, tuple[Tensor, State | None]]  # by the id of the scores, which are kept with their state

    def holds_for(self, scores: Tensor) -> bool:
        known, before = self.states.get(id(scores), (None, None))
        return known is scores and before is not None and still(cast(Scores, scores), before)


def grow_budget(model: nn.Module, step: int, steps: int) -> None:
    """Drop what the budget allows after ``step``. Call it before the first step of a loop (step 0) and after each one.

    Without a call the masks of mask_model keep their first threshold, usually 0, and may drop more than the budget.
    Adapters of PEFT select by themselves, and drop up to the whole budget from the first step.

    Args: model: A model from mask_model, or a PeftModel. It may be wrapped by torch.compile, DistributedDataParallel
        or DataParallel. A model without a budget is not changed.
    Raises: NonFiniteScores, which names the layer.
    """
    model = unwrapped(model)
    for holder in (model, *getattr(model, "peft_config", {}).values()):
        budget = budget_of(holder)
        if budget is None:
            continue
        budget.grow(step, steps)
        if holder is model:
            masked = [module for module in model.modules() if isinstance(module, MaskedLayer)]
            if not masked:
                raise ValueError(
                    f"model must have the masked layers of its budget, got a {type(model).__name__} without them "
                    "(are the masks in place?): call optimizer.grow_budget(step, steps) on what mft.in_place "
                    "returned"
                )
            budget.select(masked)


def check_within_budget(model: nn.Module, kept: int) -> None:
    """Warn if a model's masks drop more than its budget, as those of a loop do that never calls grow_budget."""
    budget = budget_of(model)
    if budget is not None and budget.weights - kept > budget.quota:
        warnings.warn(
            f"the masks drop {(budget.weights - kept) / budget.weights:.2%} of the weights, more than mask.budget = "
            f"{budget.share:g}: call mft.grow_budget(model, step, steps) after each step, or pass "
            "callbacks=[mft.BudgetCallback()] to the trainer",
            stacklevel=3,
        )


def budget_of(holder: Any) -> Budget | None:
    """Return the budget of a masked model or an adapter's PEFT configuration; None if each layer has its own share."""
    return attached(holder).budget


def make_budget(mask: MaskConfig, weights: int) -> Budget | None:
    """Return the budget that ``mask`` asks for, or None. weights: number of masked weights."""
    if mask.budget is None:
        return None
    fills = mask.mode == "magnitude" if mask.fill_budget is None else mask.fill_budget
    return Budget(mask.budget, mask.budget_ramp, mask.mode, weights, fills)


def load_with_threshold(module: MaskedLayer) -> None:
    """Let the layer replace its threshold by the one that was saved with its scores when it loads them."""
    module.register_load_state_dict_pre_hook(_take_rule)


def _take_rule(module: Any, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    rule = state_dict.get(f"{prefix}_extra_state")
    if rule is not None:
        keep_ratio, _, fixed, threshold, *_ = rule.tolist()  # also mode, and pattern in states that have one
        module.keep_ratio, module.threshold = keep_ratio, threshold if fixed else None


@torch.no_grad()
def magnitude_scores(weights: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield fp32 scores |weight| of each matrix with one common scale: root mean square 0.02 over all weights together.

    So the smallest weights of the model are dropped first. (MaskedLinear's own scores have that root mean square in
    each matrix, which would drop the same share of each.) As there, weights of 0 are kept.

    weights: is read twice, one matrix at a time.
    """
    sizes = [(float(weight.float().square().sum(dtype=torch.float64)), weight.numel()) for weight in weights]
    squares, count = (sum(each) for each in zip(*sizes))
    scale = _SCALE / max(squares / count, torch.finfo(torch.float32).tiny) ** 0.5
    for weight in weights:
        scores = (weight.abs().float() * scale).clamp_(min=torch.finfo(torch.float32).tiny)
        yield scores.masked_fill_(weight == 0, _SCALE)
