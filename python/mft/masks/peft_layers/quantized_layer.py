"""A masked layer under PEFT whose base holds NF4 or int8 codes, as in QLoRA."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mft.config import MaskConfig
from mft.masks.banked_linear import TaskPerRow
from mft.masks.convert import masked_layer
from mft.masks.peft_layers.layer import MaskLinear
from mft.masks.quantize import can_skip_dense, masked_product, quantized_product
from mft.models.codes.quantized_linears import codes_of, set_codes
from mft.models.codes.weight import QuantizedWeight
from mft_kernels import masked_linear_by_ratio
from mft_kernels.internal import current_mask, linear_on


class MaskCodes(MaskLinear):
    """MaskLinear over codes: y = x @ where(keep, dense, 0).T + bias, where dense is the decoded weight.

    If a kernel decodes, neither the product nor its d_x makes a dense weight; d_scores makes one. Merging is exact: a
    dropped weight gets the code of level 0, and unmerging puts the old codes back.
    """

    # ------------------------------------------------------------------------------------------ private

    @property
    def _quantized(self) -> QuantizedWeight:
        """The base layer's codes. Read per call, because moving the model replaces the tensors."""
        return codes_of(self.base_layer)

    def _forward_unmasked(self, x: Tensor) -> Tensor:
        # bitsandbytes' own forward pass would repack the codes on a CPU, and round absmax to bf16.
        quantized, given = self._quantized, self._cast_input(x)
        bias = self._bias_for(given)
        if given.dtype == quantized.dtype:
            return quantized_product(given, quantized, bias).to(x.dtype)
        return F.linear(given, quantized.dense().to(given.dtype), bias).to(x.dtype)

    def _compute(self, parameter: str, scores: nn.Parameter, selection: dict[str, Any], x: Tensor) -> Tensor:
        quantized, given = self._quantized, self._cast_input(x)
        bias = self._bias_for(given)
        if can_skip_dense(quantized, given, scores):
            mask = current_mask(scores, **selection)
            return masked_product(given, quantized, mask, scores, bias, mode=selection["mode"]).to(x.dtype)
        dense = quantized.dense().to(given.dtype)
        return masked_linear_by_ratio(given, dense, scores, bias, **selection).to(x.dtype)

    def _forward_mixed(self, rows: TaskPerRow, x: Tensor) -> Tensor:
        return super()._forward_mixed(rows, x.to(self._quantized.dtype)).to(x.dtype)

    def _cast_input(self, x: Tensor) -> Tensor:
        """Return x in the dtype that the base layer computes in."""
        return x if (dtype := getattr(self.base_layer, "compute_dtype", None)) is None else x.to(dtype)

    def _bias_for(self, x: Tensor) -> Tensor | None:
        return None if self.base_layer.bias is None else self.base_layer.bias.to(x.dtype)

    def _draw_scores(self, parameter: str, config: MaskConfig) -> nn.Parameter:
        weight = nn.Parameter(self._weight(parameter), requires_grad=False)
        return masked_layer(linear_on(weight, None), self.module_name, config).scores

    def _weight(self, parameter: str) -> Tensor:
        """Decode the weight; each call makes a new dense one."""
        return self._quantized.dense()

    def _base_layout(self, weight: Tensor) -> Tensor:
        return weight

    def merged_weight(self, parameter: str) -> Tensor:
        name = self._active()
        if self.disable_adapters or self.merged or name is None:
            return self._weight(parameter)
        return self.bake([name], safe_merge=False)[parameter][1]

    @torch.no_grad()
    def _take_out(self, parameter: str, keep: Tensor, merged: Tensor) -> Tensor:
        codes, taken = self._quantized.coded().dropped(keep)
        set_codes(self.base_layer, codes)
        return taken

    @torch.no_grad()
    def _put_back(self, parameter: str, keep: Tensor, taken: Tensor) -> None:
        set_codes(self.base_layer, self._quantized.coded().put_back(keep, taken))
