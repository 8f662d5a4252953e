"""Adapters of PEFT: any method with its options, and LoRA where masks go. A file holds only what was trained."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

from mft.checks import at_least, check_rule
from mft.config import MaskConfig, TrainConfig
from mft.files.figure import COLOURS
from mft_study.arms.arm import LEARNING, ON_LAYERS, Arm, Ground, parse_arm_layers
from mft_study.arms.setting import Setting
from mft_study.arms.size import ADAPTER_BYTES, NUMBER
from mft_study.arms.weights import Weights, clone_with_weights
from mft_study.peft_methods import (
    BESIDE_LINEARS,
    PLACES,
    MethodFailsError,
    add_adapter,
    check_options,
    import_peft,
    lora_options,
    merge_adapter,
    resident_bytes,
    values_to_choose_from,
)

if TYPE_CHECKING:
    from torch import nn

_SAME = 1e-3  # how far loading an adapter again may move a logit, as a share of the largest logit


class Adapters(Arm):
    """Adapters that are trained next to the frozen weights, by a method of PEFT."""

    takes = LEARNING
    needs = frozenset({"lrs"})
    learns = "adapters"
    fades = True
    near = True
    colour = COLOURS["LoRA"]

    def options(self, setting: Setting) -> dict[str, Any]:
        """Return the options of PEFT's configuration."""
        raise NotImplementedError

    def check_installed(self) -> None:
        import_peft()

    def targets(self, model: nn.Module, mask: MaskConfig, setting: Setting) -> list[str]:
        """Return the layers that a mask would choose; for a method not on linear layers, its target_modules or []."""
        from mft.masks.targets import select_targets

        options, mask = self.options(setting), self.mask_config(mask)
        if options["peft_type"] in BESIDE_LINEARS:
            return options.get("target_modules") or []
        places = {name: options[name] for name in PLACES if name in options}
        if "layers_to_transform" in places:
            places["layers_to_transform"] = _layers(places["layers_to_transform"])
        return select_targets(model, replace(mask, **places))

    def frozen_below(self, model: nn.Module, mask: MaskConfig, setting: Setting) -> int:
        from mft.models.causal_lm import first_trainable_layer

        return first_trainable_layer(self._put_on(model, mask, setting, seed=0).get_base_model())

    def untrained(self, ground: Ground) -> nn.Module:
        return self._adapted(ground).get_base_model()

    def trained_weights(self, model: nn.Module, ground: Ground) -> Weights:
        """Return what was trained, after checking that it gives the same model when it is loaded again."""
        import torch

        from mft.models.causal_lm import FEW, evaluating

        weights, device = super().trained_weights(model, ground), next(model.parameters()).device
        again, few = self.model_with(ground, weights), torch.arange(FEW, device=device)[None]
        with torch.no_grad(), evaluating(model):
            own, other = (each(input_ids=few, use_cache=False).logits for each in (model, again))
        moved = (own - other).abs().max() / own.abs().max()
        if moved > _SAME:
            raise MethodFailsError(
                f"{self.options(ground.setting)['peft_type']} cannot be loaded again: what it trained, and its seed, "
                f"give logits that differ by {moved:.2g} of the largest"
            )
        return weights

    def model_with(self, ground: Ground, weights: Weights) -> nn.Module:
        return self._loaded(ground, weights).get_base_model().eval()

    def decoded(self, ground: Ground, weights: Weights) -> nn.Module:
        return self.model_with(ground, weights)

    def merged(self, ground: Ground, weights: Weights) -> Weights:
        model, names = merge_adapter(self._loaded(ground, weights))
        return {name: model.get_parameter(name).detach() for name in names}

    def round_to_codes(self, start: nn.Module, merged: Weights, codes: str) -> Weights:
        """Return the weights rounded to codes again, with new scales per block."""
        from mft.masks.quantize import rounded_weights

        rounded = rounded_weights(clone_with_weights(start, merged), codes)
        return {name: rounded.get(name, weight) for name, weight in merged.items()}

    def stored_bytes(self, ground: Ground, model: nn.Module) -> int:
        return NUMBER * self._numbers(ground)

    def resident_bytes(self, ground: Ground, model: nn.Module) -> int:
        """Return the bytes in memory, including what the method draws but does not train."""
        return resident_bytes(self._adapted(ground), NUMBER)

    def bytes_of_mean(self, ground: Ground, model: nn.Module, runs: int) -> int:
        """Return the bytes of all runs' adapters, or of the weights if that is less."""
        adapters = runs * self.stored_bytes(ground, model)
        return min(super().bytes_of_mean(ground, model, runs) or adapters, adapters)

    def training_bytes(self, ground: Ground, train: TrainConfig) -> int:
        return int(ADAPTER_BYTES * self._numbers(ground))

    def _numbers(self, ground: Ground) -> int:
        """Return how many numbers are trained."""
        return sum(p.numel() for p in self.untrained(ground).parameters() if p.requires_grad)

    def _adapted(self, ground: Ground) -> Any:
        return self._put_on(ground.start, ground.mask, ground.setting, ground.seed)

    def _put_on(self, model: nn.Module, mask: MaskConfig, setting: Setting, seed: int) -> Any:
        """Return a PeftModel around a clone of model, whose weights it may write to."""
        from mft.models.causal_lm import clone_with_own_weights

        options, names = self.options(setting), self.targets(model, mask, setting)
        clone = clone_with_own_weights(model, () if options["peft_type"] in BESIDE_LINEARS else names)
        return add_adapter(clone, names, {k: v for k, v in options.items() if k not in PLACES}, seed)

    def _loaded(self, ground: Ground, weights: Weights) -> Any:
        import torch

        adapted = self._adapted(ground)
        model = adapted.get_base_model()
        with torch.no_grad():
            for name, weight in weights.items():
                model.get_parameter(name).copy_(weight)
        return adapted


@dataclass
class Lora(Adapters):
    """LoRA on the same layers, with alpha = 2 * rank."""

    weight_decay: Annotated[float | None, at_least(0)] = None  # AdamW's; null: that of full or stage

    takes = Adapters.takes | ON_LAYERS | {"lora_ranks"}

    def options(self, setting: Setting) -> dict[str, Any]:
        return lora_options(setting.rank or self.lora_rank)

    def optimiser(self) -> dict[str, Any]:
        return {} if self.weight_decay is None else {"weight_decay": self.weight_decay}


@dataclass
class Peft(Adapters):
    """Any method of PEFT: config has its peft_type and options."""

    colour = COLOURS["SHiRA"]

    # A list of values, such as r: [4, 16], is to choose from, in all combinations. For an option that itself takes a
    # list, such as target_modules, give a list of lists. Layers and modules are those of mask unless they are given.
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self.config)
        kind, layers = self.config["peft_type"], self.config.get("layers_to_transform")
        for one in values_to_choose_from(self.config).get("layers_to_transform", ()):
            _layers(one)
        rule = f"be left out for {kind}, which does not adapt linear layers: its target_modules name what it adapts"
        check_rule(kind not in BESIDE_LINEARS or layers is None, "config.layers_to_transform", rule, layers)

    def choices(self, mask: MaskConfig) -> dict[str, list[Any]]:
        """Return the choices with each combination of config's options, as JSON."""
        axes = values_to_choose_from(self.config)
        combined = (dict(zip(axes, values)) for values in itertools.product(*axes.values()))
        return super().choices(mask) | {"config": [json.dumps(one, sort_keys=True) for one in combined]}

    def options(self, setting: Setting) -> dict[str, Any]:
        assert setting.config is not None  # choices() gives one
        return json.loads(setting.config)

    def largest_rank(self) -> int:
        return max(values_to_choose_from(self.config).get("r", [self.lora_rank]))


def _layers(given: int | list[int] | str | None) -> int | list[int] | None:
    """Return layers as a MaskConfig has them; None: every layer."""
    return (parse_arm_layers(given) if isinstance(given, str) else given) or (0 if given == 0 else None)
