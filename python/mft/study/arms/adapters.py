"""LoRA on the layers where masks would go (study/lora.py)."""

import torch
from torch import nn

from mft.config import TrainConfig
from mft.models.causal_lm import clone_with_own_weights
from mft.models.linears import weight_name
from mft.study.arms.arm import LEARNING, ON_LAYERS, Arm, Ground
from mft.study.arms.memory import ADAPTER_BYTES
from mft.study.arms.size import NUMBER, adapter_sides
from mft.study.arms.weights import Weights
from mft.study.lora import add_lora, import_peft, merge_lora


class Lora(Arm):
    """Adapters on the same layers."""

    takes = LEARNING | ON_LAYERS | {"lora_ranks"}
    needs = frozenset({"lrs"})
    learns = "adapters"
    fades = True
    near = True
    colour = "#0072b2"

    def check_installed(self) -> None:
        import_peft()

    def untrained(self, ground: Ground) -> nn.Module:
        return self._with_adapters(ground, ground.seed)

    def model_with(self, ground: Ground, weights: Weights) -> nn.Module:
        return self._loaded(ground, weights).eval()

    def merged(self, ground: Ground, weights: Weights) -> Weights:
        merged = merge_lora(self._loaded(ground, weights))
        return {(own := weight_name(merged, name)): merged.get_parameter(own).detach() for name in ground.layers}

    def stored_bytes(self, ground: Ground, model: nn.Module) -> int:
        return NUMBER * self._rank(ground) * adapter_sides(ground.shapes())

    def bytes_of_mean(self, ground: Ground, model: nn.Module, runs: int) -> int:
        """Of all adapters, or of the weights where these are fewer."""
        return min(super().bytes_of_mean(ground, model, runs), runs * self.stored_bytes(ground, model))

    def training_bytes(self, ground: Ground, train: TrainConfig) -> int:
        return int(ADAPTER_BYTES * self._rank(ground) * adapter_sides(ground.shapes()))

    def _rank(self, ground: Ground) -> int:
        return ground.setting.rank or self.lora_rank

    def _with_adapters(self, ground: Ground, seed: int) -> nn.Module:
        return add_lora(clone_with_own_weights(ground.start), ground.layers, self._rank(ground), seed)

    def _loaded(self, ground: Ground, weights: Weights) -> nn.Module:
        model = self._with_adapters(ground, 0)
        with torch.no_grad():
            for name, weight in weights.items():
                model.get_parameter(name).copy_(weight)
        return model
