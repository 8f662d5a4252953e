"""A model's shapes from its config alone: every linear's (N, K), embeddings, norms, heads; pure Python.

A decoder layer of the families known here (Llama and what is built like it):

    norm -> q, k, v (-> norms of q and k) -> rotary -> attention -> o -> + -> norm -> gate, up -> down -> +
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mft.checks import nearest

KNOWN_MODELS = Path(__file__).with_name("known_models")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a causal language model; N is out_features and K in_features.

    Args:
        linears: of one decoder layer, by name within it, such as "self_attn.q_proj": (N, K); in the order of use.
        biases: elements of all biases of one layer.
        qk_norm: whether the heads of q and k are normalised (two norms of head_dim).
        sliding_window: tokens that attention sees; None for all.
        dtype_bytes: of a weight.
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
    qk_norm: bool = False
    sliding_window: int | None = None
    dtype_bytes: int = 2

    @cached_property
    def linear_weights(self) -> int:
        """Elements of one layer's linear weights."""
        return sum(n * k for n, k in self.linears.values())

    @property
    def layer_rest(self) -> int:
        """Elements of one layer that are no linear weight: norms and biases."""
        return 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0) + self.biases

    @property
    def embedding(self) -> int:
        """Elements of the embedding, and of the head's weight."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Elements of the whole model; a tied head counts once."""
        layers = self.layers * (self.linear_weights + self.layer_rest)
        return layers + self.embedding * (1 if self.tied else 2) + self.hidden

    def targets(self, names: list[str] | None) -> list[str]:
        """The linears whose name ends in one of names, in the order of use; all if None.

        Raises: ValueError for a name that is none.
        """
        if names is None:
            return list(self.linears)
        for name in names:
            if not any(_ends_with(linear, name) for linear in self.linears):
                known = [linear.rpartition(".")[2] for linear in self.linears]
                raise ValueError(
                    f"target_modules must name linear layers of {self.name} ({', '.join(known)}), got {name!r}"
                    f"{nearest(name, known)}"
                )
        return [linear for linear in self.linears if any(_ends_with(linear, name) for name in names)]


def shape_from_config(config: Mapping[str, Any], name: str | None = None, *, dtype: str | None = None) -> ModelShape:
    """The shapes that a config.json, as a dictionary, describes.

    Args:
        config: of a causal language model of FAMILIES.
        name: for messages and tables; the config's own if None.
        dtype: "bfloat16", "float16" or "float32", what the model will be loaded in; bfloat16 if None.
    Raises: ValueError for another family, and for what is missing in the config.
    """
    family = config.get("model_type")
    name = name or str(config.get("_name_or_path") or family)
    if family not in FAMILIES:
        raise ValueError(
            f"model must be of a family whose layers are known here ({', '.join(FAMILIES)}), {name} has "
            f"model_type={family!r}"
        )
    if dtype is not None and dtype not in _DTYPE_BYTES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPE_BYTES)}, got {dtype!r}")
    hidden, intermediate, layers, heads, vocabulary = (
        _positive(config, key, name)
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    )
    kv_heads = _positive(config, "num_key_value_heads", name, heads)
    head_dim = _positive(config, "head_dim", name, hidden // heads)
    q, kv = heads * head_dim, kv_heads * head_dim
    attention_bias = config.get("attention_bias", False)
    biases = (q + 2 * kv + (0 if family == "qwen2" else hidden)) if attention_bias or family == "qwen2" else 0
    if config.get("mlp_bias"):
        biases += 2 * intermediate + hidden
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
        linears={
            "self_attn.q_proj": (q, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, q),
            "mlp.gate_proj": (intermediate, hidden),
            "mlp.up_proj": (intermediate, hidden),
            "mlp.down_proj": (hidden, intermediate),
        },
        biases=biases,
        qk_norm=family == "qwen3",
        sliding_window=config.get("sliding_window") if config.get("use_sliding_window", family == "mistral") else None,
        dtype_bytes=_DTYPE_BYTES[dtype or "bfloat16"],
    )


def known_models() -> list[str]:
    """Names of the models whose config is shipped."""
    return sorted(path.stem for path in KNOWN_MODELS.glob("*.json"))


def known_config(name: str) -> dict[str, Any]:
    """The published config.json of a model of known_models()."""
    if name not in known_models():
        raise ValueError(
            f"model must be one of {', '.join(known_models())}, got {name!r}{nearest(name, known_models())}"
        )
    return json.loads((KNOWN_MODELS / f"{name}.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------- private


def _positive(config: Mapping[str, Any], key: str, name: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key} must be a positive integer in the config of {name}, got {value!r}")
    return value


def _ends_with(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")
