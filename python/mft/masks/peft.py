"""Masks as a PEFT method. Importing this module registers it, so that get_peft_model accepts a MaskPeftConfig.

PEFT's adapters hold scores, from which training can go on. to_masked_model and save_masks give the export with 1 bit
per weight, which PeftModel.from_pretrained loads too. docs/how-to/peft.md explains both.
"""

import copy
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from torch import Tensor, nn

from mft.checks import check_rule, nearest
from mft.config import MaskConfig
from mft.config_file import complete_saved_mask
from mft.files.hub import HubError, split_hub_id, translate_hub_errors
from mft.masks.banked_experts import note_shapes
from mft.masks.banked_linear import TaskPerRow
from mft.masks.budget import Budget, SharedThreshold, budget_of, magnitude_scores, make_budget
from mft.masks.convert import check_drawn, convert, masked_modules, pack_attentions, split_attentions
from mft.masks.export import loaded_config, read_learned, scores_of_keep, scores_of_mask
from mft.masks.export_format import CONFIG_FILE, PEFT_TYPE, check_masks_alone, is_export, read_export
from mft.masks.location import fetch_masks
from mft.masks.peft_layers.combination import COMBINATIONS, check_combination
from mft.masks.surrogate import make_surrogate
from mft.masks.targets import select_targets
from mft.models.attached import attach, attached
from mft.models.codes.quantized_linears import holds_codes
from mft.models.head_input import forget_in_one_piece, read_in_one_piece
from mft.models.routed_experts import expert_projections
from mft.number_formats import SCORE_FORMATS, unless_auto

_TRIED = "0.21", "0.22"  # first supported version, first unsupported one
_REMEDY = f"pip install 'peft>={_TRIED[0]},<{_TRIED[1]}'"

try:
    import peft
    from packaging.version import Version
    from peft import PeftConfig, PeftModel
    from peft.tuners.tuners_utils import BaseTuner
    from peft.utils import AuxiliaryTrainingWrapper, PeftType, register_peft_method

    from mft.masks.peft_layers.layer import TRL_REFERENCE, MaskExperts, MaskLinear, MaskTunerLayer
    from mft.masks.peft_layers.quantized_layer import MaskCodes
except ImportError as error:
    raise ImportError(f"mft.masks.peft needs peft >= {_TRIED[0]}: {_REMEDY}. {error}") from error

_AS_WRITTEN = "target_modules", "target_parameters", "exclude_modules"  # fields that select_targets reads, not PEFT
_BASE = "__base__"  # PEFT's word, in adapter_names, for a row without an adapter
_OF_THE_HUB = "revision", "token", "cache_dir", "local_files_only"  # PEFT's options that locate files on the Hub


@dataclass
class MaskPeftConfig(MaskConfig, PeftConfig):
    """The fields of MaskConfig and of PEFT's PeftConfig. MaskPeftConfig(**vars(mask_config)) converts a MaskConfig."""

    def __post_init__(self) -> None:
        PeftConfig.__post_init__(self)
        self.peft_type = PeftType(PEFT_TYPE)
        MaskConfig.__post_init__(self)
        self.scores_dtype = unless_auto(self.scores_dtype)  # "auto" depends on memory, which is unknown here
        check_rule(
            SCORE_FORMATS[self.scores_dtype].has_gradient,
            "scores_dtype",
            "be float32 or bfloat16 under PEFT, where autograd trains the scores (mft train takes int16)",
            self.scores_dtype,
        )
        rule = "be matrix under PEFT (mft train and mask_model take the others)"
        check_rule(self.pattern == "matrix", "pattern", rule, self.pattern)
        check_drawn(self)

    @property
    def trainable_token_indices(self) -> None:
        """Raise AttributeError, which PEFT reads as None. TRL reads this to train the tokens that it has added."""
        raise AttributeError(
            "trainable_token_indices are not for masks, which leave embeddings as they are, got tokens that were added "
            "to the tokenizer: give a chat template without new ones, as a *.jinja file or on the tokenizer"
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> "MaskPeftConfig":
        """Load from a PEFT adapter or from an export of masks, local or on the Hub. An export is checked fully."""
        directory = _export_directory(pretrained_model_name_or_path, subfolder, kwargs)
        if directory is None:
            return super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        export = read_export(directory)
        check_masks_alone(export, directory, "PEFT, which keeps such modules in files of its own")
        config = cls(
            **vars(loaded_config(export.mode)) | {"target_modules": [entry.name for entry in export.modules]},
            task_type="CAUSAL_LM",
            base_model_name_or_path=export.base_model_name_or_path,
        )
        attach(config, export=(directory, export))
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Return the values of an adapter's file, which an older version may have written."""
        values = super().from_json_file(path_json_file, **kwargs)
        complete_saved_mask(values)
        return values


class MaskModel(BaseTuner):
    """PEFT's tuner for masks: decides which layers get a mask, and handles loading and merging."""

    prefix = f"{PEFT_TYPE.lower()}_"
    tuner_layer_cls = MaskTunerLayer
    target_module_mapping: dict = {}  # noqa: RUF012  (PEFT's; select_targets knows what a model's default is)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config: Any = self.peft_config[adapter_name]
        written = {name: getattr(config, name) for name in _AS_WRITTEN}
        masks_alone = copy.copy(config)
        masks_alone.modules_to_save = None  # PEFT handles it; it may name heads that this model lacks
        with _unwrapped(model):
            names = select_targets(model, masks_alone, codes=True)
            saved = config.modules_to_save or []
            names = [name for name in names if not any(f".{module}." in f".{name}." for module in saved)]
            chosen = _parameters_of_modules(model, names)
        attach(config, chosen=chosen)
        split_attentions(model, names)
        read_in_one_piece(model)
        # PEFT reads these fields in its own way, and may write a shorter list to them.
        vars(config).update(dict.fromkeys(_AS_WRITTEN), target_modules=list(chosen))
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            vars(config).update(written)
        layers = [layer for layer in _mask_layers(model) if adapter_name in layer.mft_scores]
        weights = sum(scores.numel() for layer in layers for scores in layer.scores_of(adapter_name).values())
        attach(config, surrogate=make_surrogate(config, weights))
        if (budget := make_budget(config, weights)) is not None:
            _begin_budget(layers, adapter_name, config, budget)

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> bool:
        return key in attached(peft_config).chosen

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer: Any = target
        if not isinstance(target, MaskTunerLayer):
            kind = MaskExperts if expert_projections(target) else MaskCodes if holds_codes(target) else MaskLinear
            layer = kind(target, current_key)
        layer.add_mask(adapter_name, peft_config, attached(peft_config).chosen.get(current_key))
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if any(isinstance(module, MaskExperts | MaskCodes) for module in (child, new_module)):
            # PEFT expects one weight, but there may be several weights, or codes.
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Do nothing: scores keep the dtype that their configuration names."""

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Iterator[None]:
        """Make row i of a batch use the mask adapter_names[i], or no mask for "__base__". For inference only."""
        if adapter_names is None:
            yield
            return
        self._check_rows(adapter_names)
        beams = kwargs.get("num_beams") or 1  # a row's beams are next to each other
        names = [name for name in adapter_names for _ in range(beams)]
        rows = TaskPerRow(tuple(None if name == _BASE else name for name in names), "adapter_names")
        given: dict[type, dict[str, Any]] = {
            MaskTunerLayer: {"rows": rows},
            AuxiliaryTrainingWrapper: {"adapter_names": names},
        }

        def add(module: nn.Module, args: tuple, kwargs: dict, more: dict[str, Any]) -> tuple[tuple, dict]:
            return args, kwargs | more

        hooks = [
            module.register_forward_pre_hook(partial(add, more=more), with_kwargs=True)
            for module in self.modules()
            for kind, more in given.items()
            if isinstance(module, kind)
        ]
        for name in {name.rpartition(".")[0] for name, m in self.named_modules() if isinstance(m, MaskExperts)}:
            hooks += note_shapes(self.get_submodule(name), lambda: rows)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _check_rows(self, adapter_names: Any) -> None:
        if self.training:
            raise ValueError("adapter_names are for inference, got a model in training mode: model.eval()")
        if not isinstance(adapter_names, list | tuple):
            raise TypeError(f"adapter_names must be a list with one name per row of the batch, got {adapter_names!r}")
        for name in adapter_names:
            self._check_known("adapter_names", name, (*self.peft_config, _BASE))

    def _check_known(self, argument: str, name: str, known: Collection[str]) -> None:
        if name not in known:
            raise ValueError(
                f"{argument} must be among {', '.join(known)}, got {name!r}{nearest(str(name), list(self.peft_config))}"
            )

    # ------------------------------------------------------------------------------------------ merging

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._check_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_merge(adapter_names, safe_merge)
        base: Any = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        pack_attentions(base)
        forget_in_one_piece(base)
        return base

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Raise any layer's merge error before any layer is merged."""
        for layer in _mask_layers(self.model):
            wanted = layer.active_adapters if adapter_names is None else adapter_names
            names = [name for name in wanted if name in layer.mft_scores and name not in layer.merged_adapters]
            if names:
                layer.bake(names, safe_merge)

    # ---------------------------------------------------------------------------------------- combining

    @torch.no_grad()
    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float] | None = None,
        adapter_name: str = "combined",
        combination_type: str = "vote",
    ) -> None:
        """Combine the masks of these adapters into a new frozen mask, on all layers that any of them masks.

        Args:
            adapters: Names of masks on this model. A mask without scores for a layer counts as keeping all of it.
            weights: One positive number per adapter; only ``vote`` allows different ones. Default: 1 each.
            adapter_name: Name of the new adapter; must not be taken.
            combination_type: ``union`` keeps what any mask keeps; ``intersection`` keeps what all masks keep; ``vote``
                keeps a weight if the masks that keep it hold at least half of the sum of ``weights``.
        Raises: ValueError for a wrong argument; the model is then unchanged.
        """
        check_rule(len(adapters) > 0, "adapters", "name at least one adapter", list(adapters))
        for name in adapters:
            self._check_known("adapters", name, self.peft_config)
        check_rule(adapter_name not in self.peft_config, "adapter_name", "be a new name", repr(adapter_name))
        shares = check_combination(combination_type, weights, len(adapters))
        keeps: dict[str, Tensor] = {}
        for layer in _mask_layers(self.model):
            for part, shape in layer.shapes_of(adapters).items():
                masks = [layer.keep(name, part, shape) for name in adapters]
                keeps[layer.names[part]] = COMBINATIONS[combination_type](masks, shares)
        settings = vars(loaded_config("value")) | {"target_modules": list(keeps)}
        self.peft_config[adapter_name] = MaskPeftConfig(**settings, task_type=self.peft_config[adapters[0]].task_type)
        self.inject_adapter(self.model, adapter_name)
        for layer in _mask_layers(self.model):
            for part, scores in layer.scores_of(adapter_name).items() if adapter_name in layer.mft_scores else ():
                scores.copy_(scores_of_keep(keeps[layer.names[part]], "value"))
                scores.requires_grad_(False)

    # ------------------------------------------------------------------------------------------ loading

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        if all(key.endswith(".mask") for key in state_dict):
            state_dict = _scores_of_export(model, config)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def to_masked_model(model: PeftModel) -> nn.Module:
    """Return the model of mask_model with the active mask, for save_masks, merge_model and the recipe.

    This takes the PEFT model apart: its other masks are lost, and it must not be used any more.
    """
    (active,) = model.active_adapters
    config: Any = model.peft_config[active]
    check_rule(not config.modules_to_save, "modules_to_save", "be null (masks alone are kept)", config.modules_to_save)
    if coded := [layer.module_name for layer in _mask_layers(model) if isinstance(layer, MaskCodes)]:
        raise ValueError(
            f"masks must lie on exact weights to be exported, got {coded[0]} over codes: save_pretrained, and load the "
            "adapter on the unquantised model by PeftModel.from_pretrained"
        )
    scores: dict[str, nn.Parameter] = {}
    for layer in _mask_layers(model):
        if layer.merged:
            layer.unmerge()
        if active in layer.mft_scores:
            scores |= {layer.names[part]: learned for part, learned in layer.scores_of(active).items()}
    base = model.unload()
    convert(base, scores, config)
    modules = masked_modules(base)
    for name, masked in modules.items():
        masked.scores = scores[name]
    if (budget := budget_of(config)) is not None:
        attach(base, budget=budget)
        budget.select(list(modules.values()))
    return base


# ---------------------------------------------------------------------------------------------- private


def _mask_layers(model: nn.Module) -> list[MaskTunerLayer]:
    return [module for module in model.modules() if isinstance(module, MaskTunerLayer)]


@torch.no_grad()
def _begin_budget(layers: list[MaskTunerLayer], name: str, config: MaskPeftConfig, budget: Budget) -> None:
    """Let the layers share one threshold. TRL's reference adapter has its scores already, and its budget stays."""
    pairs = [pair for layer in layers for pair in layer.scores_and_weights(name)]
    if name != TRL_REFERENCE:
        attach(config, budget=budget)
        if config.init == "magnitude" and not any(weight.is_meta for _, weight in pairs):
            for (scores, _), begun in zip(pairs, magnitude_scores([weight for _, weight in pairs])):
                scores.copy_(begun)
    shared = SharedThreshold(budget, partial(_scores_of, layers, name))
    for layer in layers:
        layer.shared_thresholds[name] = shared


def _scores_of(layers: list[MaskTunerLayer], name: str) -> dict[str, nn.Parameter]:
    """Return the current scores of the mask of this name, by layer name. Read per call, because PEFT replaces them."""
    return {layer.names[part]: scores for layer in layers for part, scores in layer.scores_of(name).items()}


def _parameters_of_modules(model: nn.Module, names: list[str]) -> dict[str, list[str]]:
    """Return the parameters to mask by the module that PEFT will wrap: some parameters of experts, else weight."""
    chosen: dict[str, list[str]] = {}
    for name in names:
        path, _, part = name.rpartition(".")
        is_part = part in expert_projections(model.get_submodule(path))
        chosen.setdefault(path if is_part else name, []).append(part if is_part else "weight")
    return chosen


@contextmanager
def _unwrapped(model: nn.Module) -> Iterator[None]:
    """Put the unmasked base layers back in this context, for code that looks at the model's modules."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MaskTunerLayer)}
    for name, layer in layers.items():
        model.set_submodule(name, layer.base_layer)
    try:
        yield
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)


def _export_directory(place: str, subfolder: str | None, options: dict[str, Any]) -> Path | None:
    """Return the directory of the export of masks that PEFT's ``place`` names; None if it is no export of ours."""
    directory = Path(place, subfolder or "")
    if directory.exists() or subfolder is not None or split_hub_id(str(place)) is None:
        return directory if is_export(directory) else None
    where = {name: options[name] for name in _OF_THE_HUB if name in options}
    try:
        with translate_hub_errors(place, options.get("revision")):
            found = hf_hub_download(place, CONFIG_FILE, **where)
    except HubError:  # PEFT reports it in its own words
        return None
    return fetch_masks(place, **where) if is_export(Path(found).parent) else None


def _scores_of_export(model: Any, config: PeftConfig) -> dict[str, Tensor]:
    """Return an export's masks as the scores that PEFT would have saved. Raises ValueError if model has another base.

    PEFT did not check what it read, and a file on the Hub may be from another commit, so the files are read again.
    """
    if attached(config).export is None:
        raise ValueError(
            "an export of masks must be given to PeftModel.from_pretrained or load_adapter without a config, got "
            f"{config.peft_type} masks with a config of their own"
        )
    directory, export = attached(config).export
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    with _unwrapped(base):
        masks, _ = read_learned(base, export, directory, force=False)
    found = {}
    for entry in export.modules:
        path, _, part = entry.name.rpartition(".")
        key = f"{entry.name}.mft_scores" if len(entry.shape) == 2 else f"{path}.mft_scores.{part}"  # or: experts
        found[f"base_model.model.{key}"] = scores_of_mask(masks[entry.name], entry.shape, export.mode)
    return found


def _register() -> None:
    """Register the method with PEFT's public hook, which needs a member of PeftType with the method's name."""
    version = Version(peft.__version__)
    if not Version(_TRIED[0]) <= version < Version(_TRIED[1]):
        raise ImportError(f"mft.masks.peft was tried with peft {' to before '.join(_TRIED)}, got {version}: {_REMEDY}")
    if PEFT_TYPE not in PeftType.__members__:  # enum has no public way to add a member
        member = str.__new__(PeftType, PEFT_TYPE)
        member._name_ = member._value_ = PEFT_TYPE
        setattr(PeftType, PEFT_TYPE, member)
        PeftType._member_names_.append(PEFT_TYPE)
        PeftType._member_map_[PEFT_TYPE] = PeftType._value2member_map_[PEFT_TYPE] = member
    register_peft_method(name=PEFT_TYPE.lower(), config_cls=MaskPeftConfig, model_cls=MaskModel)


_register()
