"""LoRA merged under the mask of a pruned model: zeros stay zeros, and nothing runs beside the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mft.config import TrainConfig
from mft.files.figure import COLOURS
from mft_study.arms.arm import LEARNING, ON_LAYERS, Arm, Ground
from mft_study.arms.size import ADAPTER_BYTES, NUMBER
from mft_study.arms.weights import Weights

if TYPE_CHECKING:
    from torch import nn


class MaskedLora(Arm):
    """LoRA on the same layers, merged, where the start's weights are not 0; with alpha = 2 * rank."""

    takes = LEARNING | ON_LAYERS | {"lora_ranks"}
    needs = frozenset({"lrs"})
    learns = "adapters"
    may_start = True
    over_codes = False
    fades = True
    near = True
    colour = COLOURS["LoRA"]

    def untrained(self, ground: Ground) -> nn.Module:
        from mft.models.causal_lm import clone_with_own_weights
        from mft_study.low_rank import add_low_rank

        clone = clone_with_own_weights(ground.start, ground.layers)
        add_low_rank([clone.get_submodule(name) for name in ground.layers], self._rank(ground), ground.seed)
        return clone

    def start_weights(self, ground: Ground) -> Weights:
        return {name: ground.start.get_parameter(name).detach() for name in ground.weight_names()}

    def trained_weights(self, model: nn.Module, ground: Ground) -> Weights:
        """Return the merged weights."""
        modules: dict[str, Any] = {name: model.get_submodule(name.rpartition(".")[0]) for name in ground.weight_names()}
        return {name: module.weight.detach().to("cpu", copy=True) for name, module in modules.items()}

    def stored_bytes(self, ground: Ground, model: nn.Module) -> int:
        """Return the bytes of the factors; the start says where they count."""
        return NUMBER * self._numbers(ground)

    def resident_bytes(self, ground: Ground, model: nn.Module) -> int:
        """Return the bytes of the merged weights, which the start cannot share."""
        return NUMBER * ground.numbers()

    def training_bytes(self, ground: Ground, train: TrainConfig) -> int:
        return int(ADAPTER_BYTES * self._numbers(ground))

    def _rank(self, ground: Ground) -> int:
        return ground.setting.rank or self.lora_rank

    def _numbers(self, ground: Ground) -> int:
        return self._rank(ground) * sum(sum(ground.start.get_parameter(name).shape) for name in ground.weight_names())
