"""A linear layer under PEFT: the scores of several masks on one frozen weight; one is active, or each row has one."""

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mft.config import MaskConfig
from mft.masks.banked_linear import TaskPerRow
from mft.masks.convert import masked_layer
from mft_kernels import masked_linear_by_ratio, unpack_mask
from mft_kernels.checks import NonFiniteScores
from mft_kernels.masking import current_mask
from mft_kernels.scores import watch

# Of a model that comes with an adapter, TRL's trainers add one of this name by the adapter's own configuration, as the
# policy that training begins at. They copy the parameters over by LoRA's names, which scores do not have.
TRL_REFERENCE = "ref"


class MaskLinear(nn.Module, BaseTunerLayer):
    """y = x @ where(keep, weight, 0).T + bias by the active mask; the wrapped layer itself where none is.

    Args: base_layer: an nn.Linear or Conv1D, frozen and shared; module_name: its place in the model.
    """

    adapter_layer_names = ("mft_scores",)
    other_param_names = ("mft_config",)
    masks_weight = True  # see mft_kernels/maskable.py

    def __init__(self, base_layer: nn.Module, module_name: str) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
        self.module_name = module_name
        self.mft_scores = _Scores()  # by adapter: (N, K)
        self.mft_config: dict[str, MaskConfig] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self._taken_out: tuple[Tensor, Tensor] | None = None  # while merged: packed mask, dropped weights

    def add_mask(self, adapter_name: str, config: MaskConfig) -> None:
        """Add the scores that mask_model would draw for this layer; config is referred to, not copied.

        A mask of TRL's name for a reference, by the very config of a mask that is there, begins as that one's copy.
        """
        if self.merged:
            warnings.warn("A mask is added to a merged layer: unmerging it first.", stacklevel=2)
            self.unmerge()
        scores = masked_layer(self.base_layer, self.module_name, config).scores
        copied = next((name for name, other in self.mft_config.items() if other is config), None)
        if adapter_name == TRL_REFERENCE and copied is not None:
            scores.data.copy_(self.mft_scores[copied].data)
        self.mft_scores[adapter_name] = scores
        self.mft_config[adapter_name] = config

    def forward(self, x: Tensor, rows: TaskPerRow | None = None) -> Tensor:
        """By the active mask, or by that of each row; see MaskModel."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if rows is not None and not self.disable_adapters:
            return self._mixed(x, rows)
        name = next((name for name in self.active_adapters if name in self.mft_scores), None)
        if self.disable_adapters or self.merged or name is None:
            return self.base_layer(x)
        config, scores = self.mft_config[name], self.mft_scores[name]
        watch(scores)  # PEFT replaces parameters when it loads them
        try:
            return masked_linear_by_ratio(
                x,
                self._matrix(),
                scores,
                self.bias,
                keep_ratio=config.keep_ratio,
                threshold=config.threshold,
                mode=config.mode,
            )
        except NonFiniteScores:
            raise NonFiniteScores(scores.detach(), self.module_name) from None

    @torch.no_grad()
    def current_mask(self, name: str) -> Tensor:
        """The mask of this name as bits, selected again where its scores have changed."""
        config, scores = self.mft_config[name], self.mft_scores[name]
        watch(scores)  # PEFT replaces parameters when it loads them
        try:
            return current_mask(scores, config.keep_ratio, config.threshold, config.mode).packed
        except NonFiniteScores:
            raise NonFiniteScores(scores.detach(), self.module_name) from None

    def packed_mask(self, name: str) -> Tensor:
        """The mask of this name as bits; see pack_mask."""
        config, scores = self.mft_config[name], self.mft_scores[name]
        try:
            return current_mask(scores, config.keep_ratio, config.threshold, config.mode, anew=True).packed
        except NonFiniteScores:
            raise NonFiniteScores(scores.detach(), self.module_name) from None

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        if not isinstance(adapter_names, str) and len(adapter_names) > 1:
            raise ValueError(f"one mask at a time can be active, got {list(adapter_names)}: set_adapter with one name")
        super().set_adapter(adapter_names, inference_mode)

    # ------------------------------------------------------------------------------------------ merging

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Bake a mask into the weight: kept weights bit-equal, dropped ones +0. unmerge() puts these back.

        Raises: ValueError for more than one mask, scores that are not finite, and with safe_merge a kept weight that
            is not; the weight is then unchanged.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.mft_scores]
        if names:
            packed, merged = self.baked(names, safe_merge)
            matrix = self._matrix()
            self._taken_out = packed, matrix[~unpack_mask(packed, matrix.shape)]
            self._set_matrix(merged)
            self.merged_adapters.append(names[0])

    @torch.no_grad()
    def baked(self, names: list[str], safe_merge: bool) -> tuple[Tensor, Tensor]:
        """What merging the mask of this one name would use: its bits, and the masked weight (N, K)."""
        if len(self.merged_adapters + names) != 1:
            raise ValueError(
                f"one mask at a time can be merged into {self.module_name}, got {self.merged_adapters + names}: "
                "unmerge_adapter() first, and give one name in adapter_names"
            )
        broken = f"NaNs detected in the merged weights. The adapter {names[0]} seems to be broken: "  # PEFT's words
        try:
            packed = self.packed_mask(names[0])
        except NonFiniteScores as error:
            raise ValueError(f"{broken}{error}") from None
        matrix = self._matrix()
        merged = torch.where(unpack_mask(packed, matrix.shape), matrix, 0)
        if safe_merge and not merged.isfinite().all():
            raise ValueError(f"{broken}it keeps weights of {self.module_name} that are NaN or Inf")
        return packed, merged

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """What the base layer's weight would be after merge(), which is not done; that weight itself without a mask."""
        name = next((name for name in self.active_adapters if name in self.mft_scores), None)
        if self.disable_adapters or self.merged or name is None:
            return self.base_layer.weight.detach()
        merged = self.baked([name], safe_merge=False)[1]
        return merged.t().contiguous() if isinstance(self.base_layer, Conv1D) else merged

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the dropped weights back, bit for bit."""
        if self._taken_out is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        matrix = self._matrix()
        packed, dropped = self._taken_out
        keep = unpack_mask(packed.to(matrix.device), matrix.shape)
        self._set_matrix(matrix.masked_scatter(~keep, dropped.to(matrix)))
        self._taken_out = None
        self.merged_adapters.clear()

    # ------------------------------------------------------------------------------------------ private

    def _mixed(self, x: Tensor, rows: TaskPerRow) -> Tensor:
        if self.merged:
            raise ValueError(
                f"adapter_names need weights of which no mask is merged, got {self.merged_adapters[0]!r} in "
                f"{self.module_name}: unmerge_adapter() first"
            )
        named = {name for name in rows.tasks if name is not None and name in self.mft_scores}
        masks: dict[str | None, Tensor] = {name: self.current_mask(name) for name in named}
        return rows.mixed(x, self._matrix(), masks, self.bias)

    def _matrix(self) -> Tensor:
        """The weight as (N, K); a Conv1D holds its transpose."""
        weight = self.base_layer.weight
        return weight.t() if isinstance(self.base_layer, Conv1D) else weight

    def _set_matrix(self, matrix: Tensor) -> None:
        """A new tensor, so that whoever shares the old one keeps it."""
        self.base_layer.weight.data = (matrix.t() if isinstance(self.base_layer, Conv1D) else matrix).contiguous()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """PEFT's would cast the scores to the weight's dtype."""
        if adapter_name in self.mft_scores and not self.mft_scores[adapter_name].is_meta:
            scores = self.mft_scores[adapter_name]
            scores.data = scores.data.to(self.base_layer.weight.device if device is None else device)


class _Scores(nn.ParameterDict):
    """Casting the model leaves the scores' dtype alone, or their small updates would round away."""

    def _apply(self, fn: Any, recurse: bool = True) -> "_Scores":
        def move_only(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            return applied if applied.dtype == tensor.dtype else tensor.to(applied.device)

        return super()._apply(move_only, recurse)
