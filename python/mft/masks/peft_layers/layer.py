"""Masked layers under PEFT: scores of several masks on frozen weights. One mask is active, or each row has its own."""

import functools
import warnings
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mft.config import MaskConfig
from mft.masks.banked_experts import grouped_product, mixed_experts
from mft.masks.banked_linear import TaskPerRow
from mft.masks.budget import SharedThreshold
from mft.masks.convert import masked_grouped_layer, masked_layer
from mft.masks.masked_experts import experts_forward, project
from mft.masks.surrogate import hook_scores, surrogate_of
from mft.models.routed_experts import expert_projections
from mft_kernels import masked_linear_by_ratio, masked_linear_grouped_by_ratio, unpack_mask
from mft_kernels.internal import NonFiniteScores, current_mask, watch

# If a model comes with an adapter, TRL's trainers add one of this name with the same configuration, as the initial
# policy. They copy the parameters over by LoRA's names, which scores do not have.
TRL_REFERENCE = "ref"


class MaskTunerLayer(nn.Module, BaseTunerLayer):
    """Masks on the frozen, shared parameters of base_layer. Subclasses define the forward.

    names: for each parameter, the name of its masked layer in the model. scores: an empty container, by adapter.
    """

    adapter_layer_names = ("mft_scores",)
    other_param_names = ("mft_config",)
    masks_weight = True  # see mft_kernels/layers/maskable.py
    mft_scores: Any

    def __init__(self, base_layer: nn.Module, module_name: str, names: Mapping[str, str], scores: nn.Module) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
        self.module_name = module_name
        self.names = dict(names)
        self.mft_scores = scores
        self.mft_config: dict[str, MaskConfig] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self._taken_out: dict[str, tuple[Tensor, Tensor]] = {}  # while merged: packed masks, and the dropped values
        self.shared_thresholds: dict[str, SharedThreshold] = {}  # for masks with a budget

    def add_mask(self, adapter_name: str, config: MaskConfig, parameters: Collection[str] | None = None) -> None:
        """Add the scores that mask_model would draw for these parameters, by default for all that can be masked.

        config is referenced, not copied. A mask with TRL's reference name and the same config object as an existing
        mask starts as a copy of that mask.
        """
        if self.merged:
            warnings.warn("A mask is added to a merged layer: unmerging it first.", stacklevel=2)
            self.unmerge()
        chosen = self.names if parameters is None else [part for part in self.names if part in parameters]
        scores = {part: self._draw_scores(part, config) for part in chosen}
        copied = next((name for name, other in self.mft_config.items() if other is config), None)
        if adapter_name == TRL_REFERENCE and copied is not None:
            for part, learned in self.scores_of(copied).items():
                scores[part].data.copy_(learned.data)
        self._put_scores(adapter_name, scores)
        self.mft_config[adapter_name] = config

    @abstractmethod
    def scores_of(self, adapter_name: str) -> dict[str, nn.Parameter]:
        """Return the scores of the mask of this name, by parameter; only parameters that have scores."""

    def forward(self, *args: Any, rows: TaskPerRow | None = None, **kwargs: Any) -> Tensor:
        """Compute with the active mask, or with each row's mask if rows is given; see MaskModel."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if rows is not None and not self.disable_adapters:
            if self.merged:
                raise ValueError(
                    f"adapter_names need weights with no mask merged into them, got {self.merged_adapters[0]!r} in "
                    f"{self.module_name}: unmerge_adapter() first"
                )
            return self._forward_mixed(rows, *args, **kwargs)
        name = self._active()
        if self.disable_adapters or self.merged or name is None:
            return self._forward_unmasked(*args, **kwargs)
        return self._forward_masked(name, *args, **kwargs)

    def scores_and_weights(self, adapter_name: str) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield the scores of the mask of this name, each with its weight."""
        for part, scores in self.scores_of(adapter_name).items():
            yield scores, self._weight(part)

    def shapes_of(self, adapter_names: Collection[str]) -> dict[str, torch.Size]:
        """Return, by parameter, the shape of the scores that any of these masks has here."""
        with_scores = [name for name in adapter_names if name in self.mft_scores]
        return {part: scores.shape for name in with_scores for part, scores in self.scores_of(name).items()}

    def keep(self, adapter_name: str, parameter: str, shape: torch.Size) -> Tensor:
        """Return the mask of this name as booleans; all True if it has no scores for the parameter."""
        if adapter_name not in self.mft_scores or parameter not in self.scores_of(adapter_name):
            return torch.ones(shape, dtype=torch.bool, device=self._weight(parameter).device)
        return unpack_mask(self.packed_mask(adapter_name, parameter), shape)

    @torch.no_grad()
    def packed_mask(self, adapter_name: str, parameter: str, *, anew: bool = True) -> Tensor:
        """Return the packed mask of this name; see pack_mask. anew: select it again even if no score changed."""
        scores = self.scores_of(adapter_name)[parameter]
        if not anew:
            watch(scores)  # here, because PEFT replaces parameters when it loads them
        selection = self._selection(adapter_name, scores, anew=anew)
        try:
            return current_mask(scores, **selection, anew=anew).packed
        except NonFiniteScores:
            raise NonFiniteScores(scores.detach(), self.names[parameter]) from None

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        if not isinstance(adapter_names, str) and len(adapter_names) > 1:
            raise ValueError(f"one mask at a time can be active, got {list(adapter_names)}: set_adapter with one name")
        super().set_adapter(adapter_names, inference_mode)

    # ------------------------------------------------------------------------------------------ merging

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge a mask into the weights: kept weights stay bit-equal, dropped ones become +0. unmerge() undoes it.

        Raises: ValueError for more than one mask, for scores that are not finite, and with safe_merge for a kept weight
            that is not finite; the weights are then unchanged.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.mft_scores]
        if names:
            for part, (packed, merged) in self.bake(names, safe_merge).items():
                self._taken_out[part] = packed, self._take_out(part, unpack_mask(packed, merged.shape), merged)
            self.merged_adapters.append(names[0])

    @torch.no_grad()
    def bake(self, names: list[str], safe_merge: bool) -> dict[str, tuple[Tensor, Tensor]]:
        """Return what merging this one mask would use, by parameter: the packed mask, and the masked weight."""
        if len(self.merged_adapters + names) != 1:
            raise ValueError(
                f"one mask at a time can be merged into {self.module_name}, got {self.merged_adapters + names}: "
                "unmerge_adapter() first, and give one name in adapter_names"
            )
        broken = f"NaNs detected in the merged weights. The adapter {names[0]} seems to be broken: "  # PEFT's words
        found = {}
        for part in self.scores_of(names[0]):
            try:
                packed = self.packed_mask(names[0], part)
            except NonFiniteScores as error:
                raise ValueError(f"{broken}{error}") from None
            weight = self._weight(part)
            merged = torch.where(unpack_mask(packed, weight.shape), weight, 0)
            if safe_merge and not merged.isfinite().all():
                raise ValueError(f"{broken}it keeps weights of {self.names[part]} that are NaN or Inf")
            found[part] = packed, merged
        return found

    @torch.no_grad()
    def merged_weight(self, parameter: str) -> Tensor:
        """Return this parameter of the base layer as merge() would make it, without merging; unmasked, as it is."""
        name = self._active()
        if self.disable_adapters or self.merged or name is None or parameter not in self.scores_of(name):
            return getattr(self.base_layer, parameter).detach()
        return self._base_layout(self.bake([name], safe_merge=False)[parameter][1])

    @torch.no_grad()
    def active_masks(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield (parameter, packed mask, weight in the layout of the scores) of the active mask."""
        name = self._active()
        for part in () if name is None else self.scores_of(name):
            yield part, self.packed_mask(str(name), part), self._weight(part).detach()

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the dropped weights back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        for part, (packed, taken) in self._taken_out.items():
            weight = self._weight(part)
            self._put_back(part, unpack_mask(packed.to(weight.device), weight.shape), taken.to(weight.device))
        self._taken_out.clear()
        self.merged_adapters.clear()

    # ------------------------------------------------------------------------------------------ private

    @abstractmethod
    def _draw_scores(self, parameter: str, config: MaskConfig) -> nn.Parameter:
        """Return the scores that mask_model would draw."""

    @abstractmethod
    def _put_scores(self, adapter_name: str, scores: dict[str, nn.Parameter]) -> None:
        """Store the scores in mft_scores."""

    def _weight(self, parameter: str) -> Tensor:
        """Return the weight in the layout of the scores."""
        return getattr(self.base_layer, parameter)

    def _base_layout(self, weight: Tensor) -> Tensor:
        """Return a weight, given in the layout of the scores, in the layout of the base layer."""
        return weight

    def _take_out(self, parameter: str, keep: Tensor, merged: Tensor) -> Tensor:
        """Replace the weight by the merged weight. Return what _put_back needs."""
        taken = self._weight(parameter)[~keep]
        self._set_weight(parameter, merged)
        return taken

    def _put_back(self, parameter: str, keep: Tensor, taken: Tensor) -> None:
        weight = self._weight(parameter)
        self._set_weight(parameter, weight.masked_scatter(~keep, taken.to(weight)))

    def _set_weight(self, parameter: str, weight: Tensor) -> None:
        """Set the weight to a new tensor, so that other owners of the old tensor keep it."""
        getattr(self.base_layer, parameter).data = self._base_layout(weight).contiguous()

    def _active(self) -> str | None:
        """Return the name of the active mask, if it has scores here."""
        return next((name for name in self.active_adapters if name in self.mft_scores), None)

    def _forward_unmasked(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.base_layer(*args, **kwargs)

    @abstractmethod
    def _forward_masked(self, adapter_name: str, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the forward with the mask of this name, by _product_by."""

    @abstractmethod
    def _forward_mixed(self, rows: TaskPerRow, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the forward with each row's mask."""

    @abstractmethod
    def _compute(self, parameter: str, scores: nn.Parameter, selection: dict[str, Any], *given: Any) -> Tensor:
        """Compute one masked product."""

    def _product(self, adapter_name: str, parameter: str, *given: Tensor) -> Tensor:
        """Compute one product with the mask of this name. Watches the scores and hooks their surrogate first."""
        scores, config = self.scores_of(adapter_name)[parameter], self.mft_config[adapter_name]
        watch(scores)  # in each forward, because PEFT replaces parameters when it loads them
        surrogate = surrogate_of(config)
        if surrogate is not None and scores.requires_grad:
            hook_scores(scores, surrogate, threshold=config.threshold, mode=config.mode)
        selection = self._selection(adapter_name, scores)
        try:
            return self._compute(parameter, scores, selection, *given)
        except NonFiniteScores:
            raise NonFiniteScores(scores.detach(), self.names[parameter]) from None

    def _product_by(self, adapter_name: str) -> Callable[..., Tensor]:
        """Return _product. With a budget it runs outside torch.compile's graphs, which miss changes of other scores."""
        is_outside = adapter_name in self.shared_thresholds and torch.compiler.is_dynamo_compiling()
        return self._product_outside_graphs if is_outside else self._product

    @torch.compiler.disable
    def _product_outside_graphs(self, *given: Any) -> Tensor:
        return self._product(*given)

    def _selection(self, adapter_name: str, scores: nn.Parameter, *, anew: bool = False) -> dict[str, Any]:
        config, shared = self.mft_config[adapter_name], self.shared_thresholds.get(adapter_name)
        keep_ratio = 1.0 if config.keep_ratio is None else config.keep_ratio
        threshold = config.threshold if shared is None else shared.value(scores, look_at_all=anew)
        return {"keep_ratio": keep_ratio, "threshold": threshold, "mode": config.mode}

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move the scores; PEFT's method would cast them to the weight's dtype."""
        for part, scores in self.scores_of(adapter_name).items() if adapter_name in self.mft_scores else ():
            if not scores.is_meta:
                scores.data = scores.data.to(self._weight(part).device if device is None else device)


class MaskLinear(MaskTunerLayer):
    """y = x @ where(keep, weight, 0).T + bias with the active mask; the nn.Linear or Conv1D itself without one."""

    def __init__(self, base_layer: nn.Module, module_name: str) -> None:
        super().__init__(base_layer, module_name, {"weight": module_name}, _Scores())  # by adapter: (N, K)

    def scores_of(self, adapter_name: str) -> dict[str, nn.Parameter]:
        return {"weight": self.mft_scores[adapter_name]}

    # ------------------------------------------------------------------------------------------ as a sum

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Return what must be added to the weight: minus the dropped weights, else 0; in the base layer's layout.

        Raises: ValueError if the mask drops a weight that is not finite, because no sum turns that into 0.
        """
        weight = self._weight("weight").detach()
        delta = torch.where(self.keep(adapter_name, "weight", weight.shape), 0, -weight)
        if not delta.isfinite().all():
            raise ValueError(
                f"the dropped weights must be finite for get_delta_weight, got NaN or Inf in {self.module_name}: "
                "use merge_adapter, which sets them to 0"
            )
        return self._base_layout(delta)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return True and warn: a LoRA of low rank holds only a part of the mask.

        Raises: ValueError if the configuration leaves target_modules at its default, which means other layers in LoRA.
        """
        config: Any = self.mft_config.get(adapter_name)
        if config is not None and config.target_modules is None:
            raise ValueError(
                "target_modules must be given to convert a mask to LoRA, got null, which selects other layers in "
                "LoRA: name them in MaskPeftConfig"
            )
        warnings.warn(
            "A LoRA approximates a mask: what a mask drops has nearly full rank. mft.save_masks keeps the mask itself.",
            stacklevel=2,
        )
        return True

    # ------------------------------------------------------------------------------------------ private

    def _forward_masked(self, adapter_name: str, x: Tensor) -> Tensor:
        return self._product_by(adapter_name)(adapter_name, "weight", x)

    def _compute(self, parameter: str, scores: nn.Parameter, selection: dict[str, Any], x: Tensor) -> Tensor:
        return masked_linear_by_ratio(x, self._weight(parameter), scores, self.bias, **selection)

    def _draw_scores(self, parameter: str, config: MaskConfig) -> nn.Parameter:
        return masked_layer(self.base_layer, self.module_name, config).scores

    def _put_scores(self, adapter_name: str, scores: dict[str, nn.Parameter]) -> None:
        self.mft_scores[adapter_name] = scores["weight"]

    def _forward_mixed(self, rows: TaskPerRow, x: Tensor) -> Tensor:
        named = {name for name in rows.tasks if name is not None and name in self.mft_scores}
        masks: dict[str | None, Tensor] = {name: self.packed_mask(name, "weight", anew=False) for name in named}
        return rows.mixed_product(x, self._weight("weight"), masks, self.bias)

    def _weight(self, parameter: str) -> Tensor:
        """(N, K); a Conv1D holds its transpose."""
        weight = self.base_layer.weight
        return weight.t() if isinstance(self.base_layer, Conv1D) else weight

    def _base_layout(self, weight: Tensor) -> Tensor:
        return weight.t().contiguous() if isinstance(self.base_layer, Conv1D) else weight


class MaskExperts(MaskTunerLayer):
    """The function of MaskedExperts with the active mask; the wrapped experts themselves if no mask is active."""

    def __init__(self, base_layer: nn.Module, module_name: str) -> None:
        projections = expert_projections(base_layer)
        names = {part: f"{module_name}.{part}" for part in projections}
        super().__init__(base_layer, module_name, names, nn.ModuleDict())  # adapter -> parameter -> scores (E, N, K)
        self._projections = projections

    def scores_of(self, adapter_name: str) -> dict[str, nn.Parameter]:
        scores = self.mft_scores[adapter_name]  # its keys are sorted, self.names are in the model's order
        return {part: scores[part] for part in self.names if part in scores}

    # ------------------------------------------------------------------------------------------ private

    def _draw_scores(self, parameter: str, config: MaskConfig) -> nn.Parameter:
        transposed = self._projections[parameter].transposed
        name, weight = self.names[parameter], self._weight(parameter)
        return masked_grouped_layer(weight, None, transposed=transposed, name=name, config=config).scores

    def _put_scores(self, adapter_name: str, scores: dict[str, nn.Parameter]) -> None:
        self.mft_scores[adapter_name] = _Scores(scores)

    def _forward_masked(self, adapter_name: str, *args: Any, **kwargs: Any) -> Tensor:
        product = functools.partial(self._product_by(adapter_name), adapter_name)
        return experts_forward(self.base_layer, product, *args, **kwargs)

    def _product(self, adapter_name: str, parameter: str, *given: Tensor) -> Tensor:
        if parameter not in self.mft_scores[adapter_name]:
            return project(self.base_layer, parameter, *given)
        return super()._product(adapter_name, parameter, *given)

    def _compute(self, parameter: str, scores: nn.Parameter, selection: dict[str, Any], *given: Any) -> Tensor:
        weight, bias, transposed = (
            self._weight(parameter),
            self._bias(parameter),
            self._projections[parameter].transposed,
        )
        x, offsets = given
        return masked_linear_grouped_by_ratio(x, weight, scores, offsets, bias, transposed=transposed, **selection)

    def _forward_mixed(self, rows: TaskPerRow, *args: Any, **kwargs: Any) -> Tensor:
        def of_task(name: str | None, *args: Any, **kwargs: Any) -> Tensor:
            if name is None:
                return self.base_layer(*args, **kwargs)
            masks = {part: self.packed_mask(name, part, anew=False) for part in self.scores_of(name)}

            def product(part: str, x: Tensor, offsets: Tensor) -> Tensor:
                bias, transposed = self._bias(part), self._projections[part].transposed
                return grouped_product(x, self._weight(part), masks.get(part), offsets, bias, transposed)

            return experts_forward(self.base_layer, product, *args, **kwargs)

        return mixed_experts(rows, self.base_layer, frozenset(self.mft_scores), of_task, args, kwargs)

    def _bias(self, parameter: str) -> Tensor | None:
        bias = self._projections[parameter].bias
        return None if bias is None else getattr(self.base_layer, bias)


# ---------------------------------------------------------------------------------------------- private


class _Scores(nn.ParameterDict):
    """Scores that keep their dtype if the model is cast; otherwise their small updates would be lost to rounding."""

    def _apply(self, fn: Any, recurse: bool = True) -> "_Scores":
        def move_only(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            kept = applied if applied.dtype == tensor.dtype else tensor.to(applied.device)
            return kept.detach()  # a plain tensor: torch may wrap it in a Parameter, but cannot wrap Scores

        return super()._apply(move_only, recurse)
