"""This process's rows of the scores of a model whose weights stay in their files; and the masks that rows select.

The model is on the meta device (weight_files.py). A matrix is whole for a moment, one at a time: when its scores begin,
because their bits must not depend on the number of processes, and on the first process when its mask is exported.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mft.config import MaskConfig
from mft.engines.distributed import Processes
from mft.masks.budget import Budget, budget_of, magnitude_scores
from mft.masks.convert import masked_grouped_layer, masked_layer, masked_modules, set_scores
from mft.masks.export import weight_named
from mft.masks.inspection import count_bits
from mft.models.attached import attach, attached
from mft_kernels import MaskedGroupedLinear, MaskedLayer, kept_thresholds, pack_mask
from mft_kernels.internal import code_at_least, linear_on, part_thresholds, selectable

NOT_FINITE = 0x7E00  # for int16 scores: the code that the selection of masks reads as NaN


class ScoreRows:
    """The rows that one of several processes holds of the scores of a model on the meta device.

    rows: by layer, on ``device``; training writes them in place. All processes must make the same calls.
    """

    def __init__(self, model: nn.Module, processes: Processes, device: torch.device) -> None:
        self.processes, self.device = processes, device
        self.rows: dict[str, Tensor] = {}
        self._model = model
        attach(model, score_rows=self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ScoreRows":
        return self

    def begin(self, config: MaskConfig, change: Callable[[str, MaskedLayer], None] | None = None) -> None:
        """Start the scores as mask_model(model, config) starts those of a whole model, bit for bit.

        change: called with each layer's name and the whole layer, to set other scores.
        """
        names = list(masked_modules(self._model))
        if change is None and config.budget is not None and config.init == "magnitude":
            scores = magnitude_scores(_Weights(self._model, names))
            change = lambda _, layer: set_scores(layer, next(scores))  # noqa: E731  (in the order of names)
        for name in names:
            layer = _whole_layer(self._model, name, config)
            if change is not None:
                change(name, layer)
            self.rows[name] = self._own(layer.scores.detach()).to(self.device, copy=True)
        budget = budget_of(self._model)
        if budget is not None and budget.quota:
            select_rows(self.rows, masked_modules(self._model), budget, self.processes)

    @torch.no_grad()
    def masks(self) -> dict[str, Tensor]:
        """Return this process's rows of the masks that the scores select now, packed."""
        modules = masked_modules(self._model)
        thresholds = select_rows(self.rows, modules, None, self.processes)  # a budget has set its threshold
        return {name: pack_mask(self.rows[name], thresholds[name], mode=modules[name].mode) for name in modules}

    def gathered(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the whole masks on the CPU of the first process, gathered one at a time; {} on the others."""
        modules, found = masked_modules(self._model), {}
        for name, own in masks.items():
            whole = self.processes.rows_on_first(own, len(modules[name].scores))
            if whole is not None:
                found[name] = whole.cpu().contiguous()
        return found

    def scattered(self, masks: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield (layer, this process's rows of its mask) of whole masks that the first process has, one at a time."""
        for name, module in masked_modules(self._model).items():
            *rows, columns = module.scores.shape
            words = self.processes.broadcast_first(masks.get(name), (*rows, -(-columns // 32)), torch.int32)
            yield name, self._own(words).to(self.device)

    def flipped_share(self, first: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> float:
        """Return the share of all masked weights whose bit differs between these rows of masks."""
        differ = sum(int(count_bits(now[name] ^ packed)) for name, packed in first.items())
        weights = sum(module.scores.numel() for module in masked_modules(self._model).values())
        return self.processes.sum(differ)[0] / weights

    def _own(self, whole: Tensor) -> Tensor:
        most = -(-len(whole) // self.processes.count)
        return whole[most * self.processes.rank : most * (self.processes.rank + 1)]


def score_rows(model: nn.Module) -> ScoreRows | None:
    """Return the rows that this process holds; None for a model that is whole."""
    return attached(model).score_rows


def select_rows(
    rows: Mapping[str, Tensor], modules: Mapping[str, MaskedLayer], budget: Budget | None, processes: Processes
) -> dict[str, Tensor]:
    """Return the thresholds over the rows of all processes. An expert is whole on one process, which needs no other."""
    if budget is not None:
        with processes.together():
            shared = budget.threshold(rows.values, processes.add_up)
        for module in modules.values():
            module.threshold = shared
    found = {name: threshold_tensor(rows[name], m.threshold) for name, m in modules.items() if m.threshold is not None}
    free = {name: module for name, module in modules.items() if module.threshold is None}
    matrices = {name: module for name, module in free.items() if module.scores.dim() == 2}
    for mode in sorted({module.mode for module in matrices.values()}):
        these = {name: module for name, module in matrices.items() if module.mode == mode}
        dropped = [int((1 - module.keep_ratio) * module.scores.numel()) for module in these.values()]
        values = part_thresholds([rows[name] for name in these], dropped, mode=mode, add_up=processes.add_up)
        found |= {name: threshold_tensor(rows[name], value) for name, value in zip(these, values)}
    return found | {name: _expert_thresholds(free[name], rows[name]) for name in free.keys() - matrices.keys()}


def threshold_tensor(own: Tensor, threshold: float) -> Tensor:
    """Return the threshold as a 0-d tensor in the dtype of the scores; for int16 as their code."""
    if own.dtype != torch.int16:
        return own.new_full((), threshold)
    return own.new_full((), nan_of(own.dtype) if math.isnan(threshold) else code_at_least(threshold))


def nan_of(dtype: torch.dtype) -> float:
    return NOT_FINITE if dtype == torch.int16 else math.nan


# ---------------------------------------------------------------------------------------------- private


class _Weights:
    """The weights of these layers, each read when it is asked for."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self._model, self._names = model, names

    def __iter__(self) -> Iterator[Tensor]:
        return (weight_named(self._model, name) for name in self._names)


def _whole_layer(model: nn.Module, name: str, config: MaskConfig) -> MaskedLayer:
    """Return the masked layer of this name with its weight and the scores that config draws."""
    module, weight = masked_modules(model)[name], weight_named(model, name)
    if isinstance(module, MaskedGroupedLinear):
        return masked_grouped_layer(weight, None, transposed=module.transposed, name=name, config=config)
    return masked_layer(linear_on(nn.Parameter(weight.contiguous(), requires_grad=False), None), name, config)


def _expert_thresholds(module: MaskedLayer, own: Tensor) -> Tensor:
    """Return the thresholds of this process's experts."""
    if not len(own):  # there are more processes than shares of the experts
        return own.new_empty(0)
    if own.is_cpu and not selectable(own).isfinite().all():  # kept_thresholds would raise, in this process only
        return own.new_full((len(own),), nan_of(own.dtype))
    return kept_thresholds(own, module.keep_ratio, mode=module.mode)
