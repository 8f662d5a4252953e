"""The experts that a layer routes its tokens through, and their sizes, from a config alone; pure Python.

    router -> each token's top_k of E experts -> gate_up_proj (2I, H) -> gate -> down_proj (H, I) -> weighted sum

transformers holds all experts' weights of one kind in one parameter. Here it is (E, N, K), whatever its layout there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss")
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
_SPARSE_BY_LAYER = ("qwen2_moe", "qwen3_moe")  # families in whose config some layers may be dense


@dataclass(frozen=True)
class Mixture:
    """The experts of one layer: E experts, of which a token takes top_k; hidden H; intermediate I, of one expert.

    shared: intermediate size of the expert for all tokens, or 0. weighs_in_fp32: whether routing weights, and so the
    weighted outputs, are fp32 for any dtype of the model. is_clamped: gate and up are clamped; autograd keeps more.
    """

    experts: int
    top_k: int
    hidden: int
    intermediate: int
    shared: int = 0
    is_biased: bool = False
    weighs_in_fp32: bool = False
    is_clamped: bool = False

    @property
    def matrices(self) -> dict[str, tuple[int, int, int]]:
        """The shapes (E, N, K) of the parameters, by name within the layer, in the order of use."""
        hidden, wide = self.hidden, self.intermediate
        return {GATE_UP: (self.experts, 2 * wide, hidden), DOWN: (self.experts, hidden, wide)}

    @property
    def rest(self) -> int:
        """Number of elements of the router and of all biases."""
        biases = self.experts * (1 + 2 * self.intermediate + self.hidden) if self.is_biased else 0
        return self.experts * self.hidden + biases

    def busy(self, tokens: int) -> float:
        """Return the expected number of experts that see a token, if each token's experts are drawn uniformly."""
        return self.experts * (1 - (1 - self.top_k / self.experts) ** tokens)


def mixture_from_config(config: Mapping[str, Any], name: str) -> Mixture | None:
    """Return the Mixture of a config, or None for other families. Raises: ValueError if it is not complete."""
    family = config.get("model_type")
    if family not in FAMILIES:
        return None
    if family in _SPARSE_BY_LAYER:
        _check_all_sparse(config, name)
    count = "num_local_experts" if config.get("num_experts") is None else "num_experts"
    wide = "moe_intermediate_size" if family in _SPARSE_BY_LAYER else "intermediate_size"
    experts, top_k = positive(config, count, name), positive(config, "num_experts_per_tok", name)
    if top_k > experts:
        raise ValueError(
            f"num_experts_per_tok must be at most {experts}, the number of experts, in the config of {name}, "
            f"got {top_k}"
        )
    return Mixture(
        experts=experts,
        top_k=top_k,
        hidden=positive(config, "hidden_size", name),
        intermediate=positive(config, wide, name),
        shared=positive(config, "shared_expert_intermediate_size", name) if family == "qwen2_moe" else 0,
        is_biased=family == "gpt_oss",
        weighs_in_fp32=family == "mixtral",
        is_clamped=family == "gpt_oss",
    )


def positive(config: Mapping[str, Any], key: str, name: str, default: int | None = None) -> int:
    """Return config[key]. Raises: ValueError unless it is a positive integer."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key} must be a positive integer in the config of {name}, got {value!r}")
    return value


# ---------------------------------------------------------------------------------------------- private


def _check_all_sparse(config: Mapping[str, Any], name: str) -> None:
    """Raise ValueError if a layer is dense, by the rule of transformers."""
    dense, step = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step", 1)
    if dense:
        said = f"mlp_only_layers={dense}"
    elif step != 1:
        said = f"decoder_sparse_step={step}"
    else:
        return
    raise ValueError(
        f"model must have experts in every layer to be estimated, {name} has dense layers between them ({said})"
    )
