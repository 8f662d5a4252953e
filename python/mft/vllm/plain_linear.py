"""A linear method for vLLM whose weights stay ordinary matrices: --quantization mft.

On a CPU, vLLM packs each linear weight for oneDNN and empties layer.weight. Only a quantisation chooses the method.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from mft.vllm.token_masks import TokenMasks
from mft.vllm.versions import NAME


class PlainLinearMethod(UnquantizedLinearMethod):
    """Keeps weights as they were loaded, and multiplies with PyTorch, or with token_masks if they are set."""

    token_masks: TokenMasks | None = None

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Leave layer.weight as it is."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.token_masks is not None:
            return self.token_masks.product(x, layer.weight, bias)
        return torch.nn.functional.linear(x, layer.weight, bias)


@register_quantization_config(NAME)
class PlainLinearConfig(QuantizationConfig):
    """Quantises nothing. Embeddings, attention and experts stay as vLLM makes them."""

    def get_name(self) -> Any:
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "PlainLinearConfig":
        return cls()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        return PlainLinearMethod() if isinstance(layer, LinearBase) else None


def is_plain(layer: nn.Module) -> bool:
    """Return whether a change of layer.weight changes what the layer computes."""
    return isinstance(getattr(layer, "quant_method", None), PlainLinearMethod)
