"""Select the linear layers to mask: target_modules, target_parameters, layers_to_transform, exclude_modules as in PEFT.

A pattern that names a layer that cannot be masked, or that adds nothing, is an error that says why. Without a pattern,
attention and MLP of every layer are selected: encoder and decoder, vision and text. If the model generates text from
one decoder, only that decoder's layers are. A warning names the linears left out, except routers.
"""

import itertools
import re
import warnings
from collections.abc import Callable, Iterable

from torch import nn
from transformers.pytorch_utils import Conv1D

from mft.checks import nearest
from mft.config import MaskConfig
from mft.masks.saved_modules import is_inside, select_saved_modules
from mft.models.linears import Candidate, check_maskable, find_candidates, layer_stacks, list_some, outer_lists
from mft_kernels.internal import check_pattern

ALL_LINEAR = "all-linear"
# Path components and class names that mean attention or an MLP: fc1 and fc2 in OPT's layer, intermediate and output in
# BERT's, intermediate_query in the Q-Former's. An MLP with another name (T5's DenseReluDense) is recognised by its
# shapes, unless _NEITHER matches. `make architectures` tries this on all of text, vision and speech in transformers.
_ATTENTION_OR_MLP = re.compile(
    r"attn|attention|mlp|feed_?forward|ffn|expert|moe|^fc_?\d$|^(intermediate|output)(_query)?$", re.IGNORECASE
)
# ConvNeXt's pointwise convolutions are linear layers to four times the width and back.
_NEITHER = re.compile(r"mamba|mixer|ssm|lstm|recurrent|(?<!pw)(?<!pointwise_)conv(?!next)|norm", re.IGNORECASE)
_ROUTERS = {"gate", "router", "shared_expert_gate"}  # they route tokens to experts
_INDEXER = "indexer"  # it chooses the keys that a query attends to; no gradient passes through the choice


def select_targets(model: nn.Module, config: MaskConfig, *, codes: bool = False) -> list[str]:
    """Return the names of the linear layers that config chooses, in the model's order.

    Args: codes: whether layers that hold NF4 or int8 codes can be masked.
    Raises: ValueError if nothing is chosen, if a pattern adds nothing, if a layer is out of range, or if a chosen
        module cannot be masked.
    """
    stacks = layer_stacks(model)
    candidates = find_candidates(model, stacks)
    if not candidates:
        raise ValueError(f"model must have linear layers, got {type(model).__name__} without any")
    layers = _requested_layers(config.layers_to_transform, stacks)
    excluded = _excluded(config.exclude_modules, candidates)
    saved = select_saved_modules(model, config.modules_to_save)

    def allowed(candidate: Candidate) -> bool:
        is_kept = candidate.name in excluded or is_inside(candidate.name, saved)
        return not is_kept and (layers is None or candidate.layer in layers)

    chosen: dict[str, Candidate] = {}
    requests = [_requests_of_parameters(config.target_parameters or [], candidates)]
    if config.target_parameters is None or config.target_modules is not None:
        requests.append(_requests(model, config.target_modules, candidates, stacks))
    for pattern, matches in itertools.chain(*requests):
        kept = [c for c in matches if not c.is_head and allowed(c)]
        if not kept:
            raise ValueError(_why_nothing(pattern, matches, config))
        chosen.update({c.name: c for c in kept})
    check_maskable(model, chosen.values(), codes=codes)
    if config.pattern != "matrix":
        assert config.keep_ratio is not None, "MaskConfig has checked it"
        for c in chosen.values():
            shape = c.weight.t().shape if isinstance(c.module, Conv1D) else c.weight.shape
            check_pattern(config.pattern, config.keep_ratio, config.threshold, shape, c.name)
    if config.target_modules is None and config.target_parameters is None:
        in_layers = [c for c in candidates if c.layer is not None and not c.is_head and allowed(c)]
        _tell_left_out([c for c in in_layers if _default(c, stacks) == "other"])
        elsewhere = [c for c in candidates if c.name not in excluded and not is_inside(c.name, saved)]
        _tell_other_towers(stacks, _other_towers(model, stacks, elsewhere))
    return [c.name for c in candidates if c.name in chosen]


# ---------------------------------------------------------------------------------------------- patterns


def _requests(
    model: nn.Module, targets: str | list[str] | None, candidates: list[Candidate], stacks: dict[str, nn.ModuleList]
) -> Iterable[tuple[str, list[Candidate]]]:
    """Yield each pattern of target_modules with its matches. No match is a ValueError."""
    if targets is None:
        in_layers = [c for c in candidates if c.layer is not None and not c.is_head]
        matches = [c for c in in_layers if _default(c, stacks) == "target"]
        if not matches:
            raise ValueError(
                "target_modules must be given for this model: no layers with attention or MLP "
                f"linears were found in {type(model).__name__}; its linear layers: {_endings(candidates)}"
            )
        yield "target_modules=None (attention and MLP)", matches
    elif isinstance(targets, str):
        whole = targets == ALL_LINEAR
        matches = candidates if whole else [c for c in candidates if _compile("target_modules", targets)(c.name)]
        if not matches:
            raise ValueError(_no_match(model, "target_modules", targets, candidates))
        yield f"target_modules={targets!r}", matches
    else:
        for suffix in targets:
            matches = [c for c in candidates if _ends_with(c.name, suffix)]
            if not matches:
                raise ValueError(_no_match(model, "target_modules", suffix, candidates, is_suffix=True))
            yield f"target_modules: {suffix!r}", matches


def _requests_of_parameters(names: list[str], candidates: list[Candidate]) -> Iterable[tuple[str, list[Candidate]]]:
    """Yield each name of target_parameters with the candidates whose weights it names. No match is a ValueError."""
    for suffix in names:
        matches = [c for c in candidates if _ends_with(c.weight_name, suffix)]
        if not matches:
            known = {c.weight_name if suffix.count(".") > 1 else c.weight_name.split(".", 1)[-1] for c in candidates}
            known |= {".".join(c.weight_name.split(".")[-2:]) for c in candidates}
            raise ValueError(
                f"target_parameters: {suffix!r} matches the weight of no linear layer{nearest(suffix, sorted(known))}; "
                "it takes the ends of parameters' names, such as experts.gate_up_proj or q_proj.weight"
            )
        yield f"target_parameters: {suffix!r}", matches


def _default(candidate: Candidate, stacks: dict[str, nn.ModuleList]) -> str:
    """Classify a linear inside a layer for target_modules=None: "target", "router", or "other"."""
    stack = next(name for name in stacks if candidate.name.startswith(f"{name}."))
    index, *path = candidate.name.removeprefix(f"{stack}.").split(".")
    classes, module = [], stacks[stack][int(index)]
    for part in path[:-1]:
        module = getattr(module, part)
        classes.append(_own_name(type(module)))
    if {*_ROUTERS, _INDEXER} & set(path) or any("Router" in n for n in [*classes, type(candidate.module).__name__]):
        return "router"
    names = [stack.rpartition(".")[2], *path, *classes]  # XLM has one list of attentions and one list of ffns
    if any(_ATTENTION_OR_MLP.search(name) for name in names):
        return "target"
    is_mlp = _is_in_an_mlp(candidate.module, module) and not any(_NEITHER.search(name) for name in names)
    return "target" if is_mlp else "other"


def _other_towers(model: nn.Module, stacks: dict[str, nn.ModuleList], candidates: list[Candidate]) -> list[str]:
    """Return lists of layers with attention or MLP that are not in stacks, such as a language model's vision tower."""
    found = []
    for name, layers in outer_lists(model).items():
        inside = [c for c in candidates if c.name.startswith(f"{name}.") and c.module not in layers]
        if name not in stacks and any(_default(c, {name: layers}) == "target" for c in inside):
            found.append(name)
    return found


def _own_name(kind: type) -> str:
    """Return a class's name without its model's name: GraniteMoeHybridMambaLayer has no experts despite "Moe"."""
    package, _, rest = kind.__module__.removeprefix("transformers.models.").partition(".")
    family = package.replace("_", "") if rest else ""
    return kind.__name__[len(family) :] if kind.__name__.lower().startswith(family) else kind.__name__


def _is_in_an_mlp(linear: nn.Module, parent: nn.Module) -> bool:
    """Return whether linear is one of a pair in parent: one to a larger width, and a later one back."""
    linears = [child for child in parent.children() if isinstance(child, nn.Linear | Conv1D)]
    for wide, back in itertools.combinations(linears, 2):
        if linear in (wide, back) and _shape(wide) == _shape(back)[::-1] and _shape(wide)[0] > _shape(wide)[1]:
            return True
    return False


def _shape(linear: nn.Linear | Conv1D) -> tuple[int, int]:
    """(N, K)"""
    n, k = linear.weight.shape
    return (k, n) if isinstance(linear, Conv1D) else (n, k)


def _excluded(patterns: str | list[str] | None, candidates: list[Candidate]) -> set[str]:
    """Return the names that exclude_modules excludes. A listed suffix may name a parent module, such as "experts"."""
    if patterns is None:
        return set()
    excluded: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if isinstance(patterns, str):
            matches = {c.name for c in candidates if _compile("exclude_modules", pattern)(c.name)}
        else:
            matches = {c.name for c in candidates if f".{pattern}." in f".{c.name}."}
        if not matches:
            raise ValueError(_no_match(None, "exclude_modules", pattern, candidates, isinstance(patterns, list)))
        excluded |= matches
    return excluded


def _requested_layers(layers: int | list[int] | None, stacks: dict[str, nn.ModuleList]) -> set[int] | None:
    if layers is None:
        return None
    wanted = {layers} if isinstance(layers, int) else set(layers)
    if not stacks:
        raise ValueError(
            "layers_to_transform needs a model with a list of decoder layers, and none was found: "
            "name the layers in target_modules"
        )
    depth = max(map(len, stacks.values()))
    outside = sorted(layer for layer in wanted if not 0 <= layer < depth)
    if outside or not wanted:
        raise ValueError(
            f"layers_to_transform must lie in 0 to {depth - 1} ({', '.join(stacks)} has {depth} layers), "
            f"got {list_some(map(str, outside)) if outside else 'none'}"
        )
    return wanted


def _compile(argument: str, pattern: str) -> Callable[[str], re.Match | None]:
    try:
        return re.compile(pattern).fullmatch
    except re.error as error:
        raise ValueError(
            f"{argument} as one string is a regular expression for the full module name, and {pattern!r} "
            f"is none: {error}"
        ) from None


def _ends_with(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")


# ---------------------------------------------------------------------------------------------- messages


def _no_match(
    model: nn.Module | None, argument: str, pattern: str, candidates: list[Candidate], is_suffix: bool = False
) -> str:
    here = f"linear layers here: {_endings(candidates)}"
    for name, module in model.named_modules() if model is not None else ():
        if (_ends_with(name, pattern) if is_suffix else name == pattern) and name:
            return f"{argument}: {pattern!r} names {name} ({type(module).__name__}), not a linear layer; {here}"
    if is_suffix:
        known = [c.name if "." in pattern else c.suffix for c in candidates if not c.is_head]
        return f"{argument}: {pattern!r} matches no linear layer{nearest(pattern, known)}; {here}"
    if any(_ends_with(c.name, pattern) for c in candidates):
        return (
            f"{argument}: {pattern!r} matches no linear layer: one string is a regular expression for the full "
            f"name; for a suffix pass a list, [{pattern!r}]"
        )
    words = [ALL_LINEAR] if argument == "target_modules" else []
    suggestion = nearest(pattern, words + [c.name for c in candidates if not c.is_head])
    return f"{argument}: {pattern!r} matches the full name of no linear layer{suggestion}; {here}"


def _why_nothing(pattern: str, matches: list[Candidate], config: MaskConfig) -> str:
    if all(c.is_head for c in matches):
        return (
            f"{pattern} matches only the output embedding {list_some(c.name for c in matches)}, which is never "
            "masked: masks are for attention and MLP, and it often shares its weight with the input embedding"
        )
    matches = [c for c in matches if not c.is_head]
    layers = sorted({c.layer for c in matches if c.layer is not None})
    filters = [
        f"{name}={value!r}"
        for name in ("layers_to_transform", "exclude_modules", "modules_to_save")
        if (value := getattr(config, name)) is not None
    ]
    where = f"in layers {list_some(map(str, layers))}" if layers else "outside the decoder layers"
    found = list_some(c.name for c in matches)
    return f"{pattern} matches {found} {where}, but {' and '.join(filters)} leaves none of them"


def _tell_left_out(left: list[Candidate]) -> None:
    if left:
        warnings.warn(
            f"target_modules=None takes attention and MLP, and leaves out what is neither by name or shape: "
            f"{_endings(left)} ({left[0].name} and {len(left) - 1} more). Name such linear layers in target_modules to "
            "mask them too, or in exclude_modules to leave them out without this warning",
            stacklevel=1,  # always this line, so that Python shows it once even if a run chooses twice
        )


def _tell_other_towers(stacks: dict[str, nn.ModuleList], others: list[str]) -> None:
    if others:
        warnings.warn(
            f"target_modules=None takes the layers of {list_some(stacks)}, and leaves out those of "
            f"{list_some(others)}. Name their linear layers in target_modules to mask them too, or in exclude_modules "
            "to leave them out without this warning",
            stacklevel=1,
        )


def _endings(candidates: Iterable[Candidate]) -> str:
    return ", ".join(sorted({c.suffix for c in candidates if not c.is_head}))
