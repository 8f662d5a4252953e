"""A model's shapes from its config alone: (N, K) of every linear, embeddings, norms, heads; pure Python.

A decoder layer of the known families (Llama and models with its structure):

    norm -> q, k, v (-> norms of q and k) -> rotary -> attention -> o -> + -> norm -> gate, up -> down -> +

In a mixture the last three are a router and experts: see mixture.py.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mft.checks import nearest
from mft.memory import mixture
from mft.memory.mixture import Mixture, mixture_from_config, positive
from mft.number_formats import DTYPE_BYTES

KNOWN_MODELS = Path(__file__).with_name("known_models")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", *mixture.FAMILIES)
_NEVER_MASKED = ("shared_expert_gate",)  # a linear layer that scales the shared expert's output


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a causal language model; N is out_features and K in_features.

    Args:
        linears: (N, K) of one layer's linears in the order of use, by name within it, such as "self_attn.q_proj".
        biases: elements of all biases of one layer, without those of experts; qk_norms: of the norms of q and k, or 0.
        sliding_window: Number of tokens that attention sees; None for all, or if attention holds T x T scores anyway.
        has_sinks: Whether attention has a learned sink per head. transformers then runs it eagerly, with T x T scores.
        mixture: The experts of every layer; None if there are none, and linears then has the MLP.
        checkpoint: The quantisation format of the published checkpoint, such as "mxfp4"; None if it has none.
    """

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    linears: Mapping[str, tuple[int, int]]
    biases: int = 0
    qk_norms: int = 0
    sliding_window: int | None = None
    has_sinks: bool = False
    mixture: Mixture | None = None
    checkpoint: str | None = None
    dtype_bytes: int = 2

    @cached_property
    def experts(self) -> dict[str, tuple[int, int, int]]:
        """The shapes (E, N, K) of the parameters that hold a layer's experts, by name within the layer."""
        return {} if self.mixture is None else self.mixture.matrices

    @cached_property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """The shapes of one layer's maskable weights, as (rows, columns): an (E, N, K) is (E * N, K)."""
        return dict(self.linears) | {name: (count * n, k) for name, (count, n, k) in self.experts.items()}

    @cached_property
    def layer_weights(self) -> int:
        """Number of elements of one layer's linears and experts."""
        return sum(n * k for n, k in self.matrices.values())

    @property
    def layer_rest(self) -> int:
        """Number of elements of one layer that cannot be masked: norms, biases, sinks, the router."""
        rest = 2 * self.hidden + self.qk_norms + self.biases + (self.heads if self.has_sinks else 0)
        return rest + (0 if self.mixture is None else self.mixture.rest)

    @property
    def embedding(self) -> int:
        """Number of elements of the embedding, and of the head's weight."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Number of elements of the whole model; a tied head counts once."""
        layers = self.layers * (self.layer_weights + self.layer_rest)
        return layers + self.embedding * (1 if self.tied else 2) + self.hidden

    def used(self, name: str) -> int:
        """Return the number of elements of this matrix that one token is multiplied by."""
        rows, columns = self.matrices[name]
        if self.mixture is None or name not in self.experts:
            return rows * columns
        return rows * columns // self.mixture.experts * self.mixture.top_k

    def targets(self, names: list[str] | None) -> list[str]:
        """Return the matrices with these endings (None: attention and MLP). Raises: ValueError without a match."""
        if names is None:
            return [matrix for matrix in self.matrices if not matrix.endswith(_NEVER_MASKED)]
        for name in names:
            if not any(_ends_with(matrix, name) for matrix in self.matrices):
                known = list(dict.fromkeys(matrix.rpartition(".")[2] for matrix in self.matrices))
                raise ValueError(
                    f"target_modules and target_parameters must name linear layers of {self.name} "
                    f"({', '.join(known)}), got {name!r}{nearest(name, known)}"
                )
        return [matrix for matrix in self.matrices if any(_ends_with(matrix, name) for name in names)]


def shape_from_config(config: Mapping[str, Any], name: str | None = None, *, dtype: str | None = None) -> ModelShape:
    """Return the shapes that a config.json, given as a dictionary, describes.

    name: for messages and tables. dtype: in which the model will be loaded, by default bfloat16.
    Raises: ValueError for a family that is not in FAMILIES, and if the config lacks a key.
    """
    family = config.get("model_type")
    name = name or str(config.get("_name_or_path") or family)
    if family not in FAMILIES:
        raise ValueError(
            f"model must be of a family whose layers are known here ({', '.join(FAMILIES)}), {name} has "
            f"model_type={family!r}"
        )
    if dtype is not None and dtype not in DTYPE_BYTES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPE_BYTES)}, got {dtype!r}")
    hidden, intermediate, layers, heads, vocabulary = (
        positive(config, key, name)
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    )
    kv_heads = positive(config, "num_key_value_heads", name, heads)
    head_dim = positive(config, "head_dim", name, hidden // heads)
    q, kv = heads * head_dim, kv_heads * head_dim
    experts, quantized = mixture_from_config(config, name), config.get("quantization_config")
    linears = {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
    }
    if experts is None:
        linears |= _mlp("mlp", intermediate, hidden)
    elif experts.shared:
        linears |= _mlp("mlp.shared_expert", experts.shared, hidden) | {"mlp.shared_expert_gate": (1, hidden)}
    return ModelShape(
        name=name,
        hidden=hidden,
        intermediate=intermediate,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=vocabulary,
        tied=bool(config.get("tie_word_embeddings", False)),
        linears=linears,
        biases=_biases(config, q, kv),
        qk_norms={"qwen3": 2 * head_dim, "qwen3_moe": 2 * head_dim, "olmoe": q + kv}.get(family, 0),
        sliding_window=_window(config),
        has_sinks=family == "gpt_oss",
        mixture=experts,
        checkpoint=quantized.get("quant_method") if isinstance(quantized, Mapping) else None,
        dtype_bytes=DTYPE_BYTES[dtype or "bfloat16"],
    )


def known_models() -> list[str]:
    """Return the names of the models whose config is shipped."""
    return sorted(path.stem for path in KNOWN_MODELS.glob("*.json"))


def known_config(name: str) -> dict[str, Any]:
    """Return the published config.json of a model in known_models()."""
    if name not in known_models():
        raise ValueError(
            f"model must be one of {', '.join(known_models())}, got {name!r}{nearest(name, known_models())}"
        )
    return json.loads((KNOWN_MODELS / f"{name}.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------- private


def _mlp(name: str, intermediate: int, hidden: int) -> dict[str, tuple[int, int]]:
    return {
        f"{name}.gate_proj": (intermediate, hidden),
        f"{name}.up_proj": (intermediate, hidden),
        f"{name}.down_proj": (hidden, intermediate),
    }


def _biases(config: Mapping[str, Any], q: int, kv: int) -> int:
    """Return the number of elements of the biases of attention and of a dense MLP."""
    family, hidden = config["model_type"], config["hidden_size"]
    biases = 0
    if family == "qwen2" or (family == "qwen2_moe" and config.get("qkv_bias", True)):
        biases = q + 2 * kv
    elif config.get("attention_bias", family == "gpt_oss"):
        biases = q + 2 * kv + hidden
    return biases + (2 * config["intermediate_size"] + hidden if config.get("mlp_bias") else 0)


def _window(config: Mapping[str, Any]) -> int | None:
    """Return the sliding window, or None. Longer rows need a T x T mask, which eager attention has for every row."""
    family = config["model_type"]
    is_used = config.get("use_sliding_window", family in ("mistral", "mixtral"))
    return config.get("sliding_window") if is_used and family != "gpt_oss" else None


def _ends_with(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")
