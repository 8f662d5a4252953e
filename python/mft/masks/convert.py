"""Convert whole models: mask chosen linear layers and freeze the rest; later merge the masks into the weights."""

import contextlib
import functools
import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mft.config import DATA_INITS, INITS, MaskConfig
from mft.masks.budget import Budget, load_with_threshold, magnitude_scores, make_budget
from mft.masks.export_format import PEFT_TYPE
from mft.masks.gradient_checkpointing import add_checkpointing_hooks, remove_checkpointing_hooks
from mft.masks.masked_experts import mask_experts, unmask_experts
from mft.masks.saved_modules import saved_modules, select_saved_modules, train_whole
from mft.masks.surrogate import make_surrogate
from mft.masks.targets import select_targets
from mft.models.attached import attach, attached
from mft.models.codes.weight import quantized_weights
from mft.models.head_input import forget_in_one_piece, read_in_one_piece
from mft.models.linears import layer_index, layer_stacks
from mft.models.parallel import check_no_deepspeed, check_unsharded, unwrapped
from mft.models.routed_experts import expert_projections
from mft.number_formats import unless_auto
from mft_kernels import MaskedGroupedLinear, MaskedLayer, MaskedLinear, MaskedMultiheadAttention, fixed_from_float
from mft_kernels.internal import check_alpha, copy_without, filled, linear_on


def mask_model(model: nn.Module, config: MaskConfig) -> nn.Module:
    """Replace the linear layers that config chooses by MaskedLinear, in place. Scores and modules_to_save are trained.

    Experts that share one parameter become a MaskedGroupedLinear inside their module, which stays (masked_experts.py).
    Weights and biases are shared, not copied, except that GPT-2's Conv1D weights are copied as transposed. Drawn scores
    depend only on config.seed and the layer's name, so choosing more layers does not change them.

    Args:
        model: any transformers model built of nn.Linear, Conv1D, experts, and layers that compute what nn.Linear
            does. An nn.MultiheadAttention offers in_proj (or q_proj, k_proj, v_proj if kdim or vdim differ) and
            out_proj.
        config: see MaskConfig. target_modules works as in PEFT: a list of suffixes, one regular expression for the full
            name, or "all-linear". None selects the attention and MLP, experts included, of every layer: encoder and
            decoder, vision and text. If the model generates text from one decoder, None selects that decoder's layers
            only. The output embedding is never masked.
            target_parameters: suffixes of weight names, such as experts.gate_up_proj. If target_modules is None, only
            these are masked.
            modules_to_save: names of modules that are trained whole, such as the head of a new classifier.
    Returns: the same model.
    Raises: ValueError if nothing is chosen, if a pattern or layer number does not exist, if a chosen module cannot be
        masked, or if config.init needs data (use mask_from_data). The model is then unchanged.
    """
    check_unwrapped(model)
    check_unmasked(model)
    check_drawn(config)
    convert(model, select_targets(model, config), config)
    return model


@torch.no_grad()
def merge_model(model: nn.Module, *, alpha: float = 1.0) -> nn.Module:
    """Merge the masks into the weights, in place: the result is an ordinary model of the original classes.

    Kept weights are bit-equal to the base's, dropped ones are +0. Parameters that were trainable before mask_model are
    trainable again.

    Args:
        model: a masked model. If torch.compile or DistributedDataParallel wraps it, the inner model is merged.
        alpha: how far to go from the base to the masked model, in (0, 1]: base + alpha * (masked - base). Below 1,
            dropped weights are scaled by 1 - alpha in fp32 and rounded once to their dtype; kept ones stay bit-equal.
    Returns: the same model, without such a wrapper.
    Raises: ValueError if nothing is masked, if scores are not finite, if fully_shard has sharded the model, or if alpha
        is below 1 and there are modules_to_save, because their initial values are not kept.
    """
    model = unwrapped(model)
    check_unsharded(model)
    masked = mergeable_modules(model)
    check_interpolable(alpha, saved_modules(model))
    for name in list(masked):
        module = masked.pop(name)  # one at a time, so that a layer's scores are freed before the next one is copied
        if isinstance(module, MaskedLinear):
            replace_module(model, name, _merged(module, alpha))
        else:
            path, _, part = name.rpartition(".")
            unmask_experts(model.get_submodule(path), part, module.merged_weight(alpha=alpha), module.bias)
        del module
    pack_attentions(model)
    remove_checkpointing_hooks(model)
    forget_in_one_piece(model)
    before = attached(model).trainable_before
    attach(model, budget=None, surrogate=None, modules_to_save=(), trainable_before=None)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.is_floating_point() if before is None else name in before)
    return model


def masked_modules(model: nn.Module) -> dict[str, MaskedLayer]:
    """Return the masked layers by name, in the model's order. Masked experts have the name of their parameter.

    Raises: RuntimeError while the masks are in place.
    """
    if attached(model).in_place is not None:
        raise RuntimeError(
            f"model must not have its masks in place here, got a {type(model).__name__} with masks in place: leave "
            "mft.in_place(model) first, or call mft.leave_in_place(model) after an interrupt"
        )
    return {name: module for name, module in model.named_modules() if isinstance(module, MaskedLayer)}


def no_masks_error(model: nn.Module, purpose: str, remedy: str, under_peft: str) -> ValueError:
    """Return the error for a model without masked layers. under_peft: the remedy if PEFT has masks on it."""
    adapters = getattr(model, "peft_config", None)
    kinds = [getattr(config, "peft_type", None) for config in adapters.values()] if isinstance(adapters, dict) else []
    name = type(model).__name__
    if PEFT_TYPE in kinds:
        return ValueError(
            f"model must have masked layers of mask_model to {purpose}, got a {name} with masks under PEFT: "
            f"{under_peft}"
        )
    return ValueError(f"model has no masked layers to {purpose}, got a plain {name}: {remedy}")


@torch.no_grad()
def set_scores(module: MaskedLayer, scores: Tensor) -> None:
    """Copy floating-point scores into the layer, rounded to the layer's score format."""
    module.scores.copy_(fixed_from_float(scores) if module.scores.dtype == torch.int16 else scores)


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """Return (trainable, total) numbers of parameters. All scores count as trainable, also int16 ones."""
    fixed_point = {id(m.scores) for m in masked_modules(model).values() if m.scores.dtype == torch.int16}
    sizes = [(p.numel(), p.requires_grad or id(p) in fixed_point) for p in model.parameters()]
    return sum(n for n, trainable in sizes if trainable), sum(n for n, _ in sizes)


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how many scores and weights are trained, with their memory, and the size of the masks on disk."""
    masked = list(masked_modules(model).values())
    trainable, total = trainable_parameters(model)
    if not masked:
        print(f"trained and kept: {trainable:,d} of {total:,d} weights")
        return
    scores, nbytes = sum(each.scores.numel() for each in masked), sum(each.scores.nbytes for each in masked)
    saved = f", and {trainable - scores:,d} weights of modules_to_save" if trainable > scores else ""
    layers = "1 masked layer" if len(masked) == 1 else f"{len(masked)} masked layers"
    print(f"trained: {scores:,d} scores, one per weight of {layers} ({nbytes / 1e6:,.1f} MB in memory){saved}")
    also = ", and those weights" if saved else "; the base's weights stay as they are"
    print(f"kept: their masks, at most 1 bit per score ({scores / 8e6:,.1f} MB on disk){also}")


@contextlib.contextmanager
def keep_all_weights(model: nn.Module) -> Iterator[None]:
    """Make masked layers keep every weight in this context: the unmasked model without a second copy."""
    masked = masked_modules(model).values()
    before = [(module.threshold, module.keep_ratio, module.pattern) for module in masked]
    for module in masked:
        module.threshold, module.keep_ratio, module.pattern = None, 1.0, "matrix"
    try:
        yield
    finally:
        for module, rule in zip(masked, before):
            module.threshold, module.keep_ratio, module.pattern = rule


# ---------------------------------------------------------------------------------------------- for export and PEFT


def convert(model: nn.Module, names: Iterable[str], config: MaskConfig) -> None:
    """Do the work of mask_model for the layers of these names, which must be maskable."""
    names = list(names)
    attach(model, trainable_before=frozenset(name for name, p in model.named_parameters() if p.requires_grad))
    model.requires_grad_(False)
    read_in_one_piece(model)
    split_attentions(model, names)
    for name in names:
        path, _, part = name.rpartition(".")
        parent = model.get_submodule(path)
        if part in expert_projections(parent):
            mask_experts(parent, part, functools.partial(masked_grouped_layer, name=name, config=config))
        else:
            replace_module(model, name, masked_layer(model.get_submodule(name), name, config))
    masked = list(masked_modules(model).values())
    weights = sum(module.scores.numel() for module in masked)
    attach(model, surrogate=make_surrogate(config, weights))
    if (budget := make_budget(config, weights)) is not None:
        _begin_budget(model, masked, budget, init=config.init)
    train_whole(model, select_saved_modules(model, config.modules_to_save))
    stacks = layer_stacks(model)
    if len(stacks) == 1:  # several stacks have no single first layer; transformers' own way is correct, if slower
        layers = [index for name in names if (index := layer_index(name, stacks)) is not None]
        if layers:
            add_checkpointing_hooks(model, next(iter(stacks)), min(layers))


def mergeable_modules(model: nn.Module) -> dict[str, MaskedLayer]:
    """Return masked_modules(model). Raises ValueError if it is empty or weights are quantised, and NonFiniteScores."""
    masked = masked_modules(model)
    if not masked:
        raise no_masks_error(model, "merge", "mask_model or load_masks first", "call model.merge_and_unload()")
    quantized = quantized_weights(model)
    if quantized:
        raise ValueError(
            f"masks must be merged into exact weights, got {len(quantized)} layers that are quantised "
            f"({next(iter(quantized))}, ...): save_masks, and load_masks on the unquantised model"
        )
    for module in masked.values():
        module.packed_mask()  # non-finite scores raise before anything is replaced
    return masked


def check_interpolable(alpha: float, modules_to_save: Iterable[str]) -> None:
    """Raise TypeError or ValueError unless masks with these modules_to_save can be merged with this alpha."""
    check_alpha(alpha)
    trained = sorted(modules_to_save)
    if alpha != 1 and trained:
        raise ValueError(
            f"alpha must be 1 with modules_to_save, got {alpha} with {', '.join(trained)}: the weights that these "
            "began with are no longer known; leave alpha out"
        )


def came_from_conv1d(module: MaskedLayer) -> bool:
    """Return whether the layer replaced a Conv1D, whose weight is (in, out)."""
    return isinstance(original_of(module), Conv1D)


def original_of(module: MaskedLayer) -> Any:
    """Return the module that the layer replaced, without weight and bias; None for an nn.Linear."""
    return attached(module).replaced


def split_attentions(model: nn.Module, names: Iterable[str]) -> None:
    """Make each nn.MultiheadAttention with a projection in names call its projections as modules, to be replaced."""
    for path in dict.fromkeys(name.rpartition(".")[0] for name in names):
        attention = model.get_submodule(path)
        if isinstance(attention, nn.MultiheadAttention):
            replace_module(model, path, MaskedMultiheadAttention.from_attention(attention))


def pack_attentions(model: nn.Module) -> None:
    """Undo split_attentions. Every projection must be an nn.Linear again."""
    for name, module in list(model.named_modules()):
        if isinstance(module, MaskedMultiheadAttention) and name:  # the model itself cannot be replaced
            replace_module(model, name, module.to_attention())


def masked_layer(source: Any, name: str, config: MaskConfig) -> MaskedLinear:
    """Return a masked layer on the weight and bias of source, a maskable layer with this name in the model."""
    options = _scores_options(name, config, source.weight)
    masked = MaskedLinear.from_linear(as_linear(source), pattern=config.pattern, **options)
    masked.module_name = name
    if type(source) is not nn.Linear:
        attach(masked, replaced=copy_without(source, "weight", "bias"))
    return masked


def masked_grouped_layer(
    weight: Tensor, bias: Tensor | None, *, transposed: bool, name: str, config: MaskConfig
) -> MaskedGroupedLinear:
    """Return a masked layer on a parameter of experts with this name in the model."""
    options = _scores_options(name, config, weight)
    masked = MaskedGroupedLinear(weight, bias, transposed=transposed, **options)
    masked.module_name = name
    return masked


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put module at the place of this name."""
    *path, child = name.split(".")
    parent = model
    for part in [None, *path]:
        parent = parent if part is None else getattr(parent, part)
        if isinstance(parent, nn.TransformerEncoder):
            parent.use_nested_tensor = False  # it is for torch's fast path, which no masked layer takes
    setattr(parent, child, module)


def as_linear(module: Any) -> nn.Linear:
    """Return module, or an equal nn.Linear if it is none. A Conv1D's weight (in, out) is copied as (out, in)."""
    if isinstance(module, nn.Linear):
        return module
    weight = module.weight.detach()
    weight = weight.t().contiguous() if isinstance(module, Conv1D) else weight
    return linear_on(nn.Parameter(weight, requires_grad=False), module.bias).train(module.training)


def check_drawn(config: MaskConfig) -> None:
    """Raise ValueError unless scores can be drawn without data."""
    if config.init in DATA_INITS:
        raise ValueError(
            f"init must be one of {', '.join(INITS)} if masks are made without data, got {config.init}: mft train "
            "has data; from Python call mft.mask_from_data(model, config, rows), or under PEFT take constant, and "
            "then mft.init_adapter_from_data(model, config, rows)"
        )


def check_unwrapped(model: nn.Module) -> None:
    """Raise TypeError or ValueError unless model is a module that is not compiled or distributed."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    check_no_deepspeed(model)
    if hasattr(model, "_orig_mod") or isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ValueError(
            f"model must be the plain model, got one wrapped in {type(model).__name__}: mask it before "
            "torch.compile and distribution"
        )


def check_unmasked(model: nn.Module) -> None:
    """Raise ValueError if any layer is masked already."""
    masked = list(masked_modules(model))
    if masked:
        raise ValueError(
            f"model must not be masked already, got {len(masked)} masked layers ({masked[0]}, ...): "
            "merge_model(model) first to learn a further mask on top, or start from a fresh model"
        )


# ---------------------------------------------------------------------------------------------- private


def _scores_options(name: str, config: MaskConfig, weight: Tensor) -> dict[str, Any]:
    dtype = torch.float64 if weight.dtype == torch.float64 else getattr(torch, unless_auto(config.scores_dtype))
    return {
        "keep_ratio": 1.0 if config.keep_ratio is None else config.keep_ratio,  # 1 until a budget selects
        "mode": config.mode,
        "init": config.init,
        "threshold": config.threshold,
        "scores_dtype": dtype,
        "generator": _generator(config.seed, name, weight.device),
    }


@torch.no_grad()
def _begin_budget(model: nn.Module, masked: list[MaskedLayer], budget: Budget, *, init: str) -> None:
    """Initialise magnitude scores on one scale for all layers, and select the masks used before the first step."""
    if budget.fills:
        budget.grow(0, 1)
    attach(model, budget=budget)
    for module in masked:
        load_with_threshold(module)
    if any(module.weight.is_meta for module in masked):
        return
    if init == "magnitude":
        for module, scores in zip(masked, magnitude_scores([module.weight for module in masked])):
            set_scores(module, scores)
    if budget.quota:
        budget.select(masked)


def _generator(seed: int, name: str, device: torch.device) -> torch.Generator:
    """Return a generator seeded by seed and the layer's name: its scores do not depend on which others are masked."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator("cpu" if device.type == "meta" else device)
    return generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _merged(module: MaskedLinear, alpha: float) -> nn.Module:
    """Return module.merge(alpha=alpha) as a module of the original class."""
    linear: Any = module.merge(alpha=alpha)
    original = original_of(module)
    if original is None:
        return linear
    weight = nn.Parameter(linear.weight.t().contiguous()) if came_from_conv1d(module) else linear.weight
    return filled(original, weight=weight, bias=linear.bias).to(weight.device).train(linear.training)
