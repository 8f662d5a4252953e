"""A small model of any transformers type: its own default configuration with small sizes, and random weights.

The sizes are passed to the configuration's constructor, so that values derived from sizes are derived from these.
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from .sizes import PARTS, SIZES

WORDS = 99
AUDIO, IMAGE = 98, 97  # tokens that stand for another tower's outputs
SMALL = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim", "embedding_size"), 64),
    **dict.fromkeys(("embed_dim", "emb_dim", "encoder_hidden_size", "decoder_hidden_size", "hidden_size_global"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "moe_intermediate_size", "decoder_ffn_dim"), 96),
    **dict.fromkeys(("encoder_ffn_dim", "d_ff", "d_inner", "encoder_intermediate_size", "hidden_dim", "mlp_dim"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers"), 4),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers", "num_decoder_layers"), 3),  # different from the decoder's
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k_experts"), 2),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), WORDS),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions"), 64),
    **dict.fromkeys(("head_dim", "d_kv", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "mamba_d_head"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "projection_dim"), 32),
    **dict.fromkeys(("index_n_heads", "index_topk"), 4),
    **dict.fromkeys(("mamba_n_heads", "mamba_d_state", "state_size", "mamba_chunk_size", "rotary_dim"), 8),
    **{"hidden_size_per_layer_input": 8},
    **{"index_head_dim": 32, "image_size": 32, "patch_size": 8, "max_source_positions": 20, "num_mel_bins": 16},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2},
    **dict.fromkeys(("audio_token_id", "audio_token_index"), AUDIO),
    **dict.fromkeys(("image_token_id", "image_token_index"), IMAGE),
    **{"n_group": 1, "topk_group": 1, "num_codevectors_per_group": 4, "conv_dim": (32,) * 7, "depths": (1, 1, 1, 1)},
}
TOWER = {"num_hidden_layers": 3}  # different from the text's depth, so that the two are not confused
MOST = 30_000_000  # weights: a larger model was not made small


def small_model(kind: str, sweep: str, make: Callable[[Any], Any]) -> Any:
    """Return a model of this type for inference; ``make`` makes it from a configuration.

    Raises: whatever transformers raises.
    """
    config = small_config(kind, sweep)
    with torch.device("meta"):
        size = sum(weight.numel() for weight in make(copy.deepcopy(config)).parameters())
    if size > MOST:
        raise ValueError(f"{size} weights at small sizes")
    torch.manual_seed(0)
    model = make(config).eval()
    for weight in model.parameters():
        if weight.is_floating_point() and weight.numel() and bool((weight == weight.flatten()[0]).all()):
            # Biases and gates that begin at zero would hide an error, and pass no gradient.
            weight.data.add_(torch.randn_like(weight), alpha=0.02)
    return model


def small_config(kind: str, sweep: str) -> Any:
    """Return the small configuration of a model type, with the values of SIZES."""
    own = SIZES.get(f"{sweep}/{kind}", SIZES.get(kind, {}))
    try:
        default = AutoConfig.for_model(kind)
    except StrictDataclassError:  # the defaults contradict each other
        default = AutoConfig.for_model(kind, **copy.deepcopy(own))
    config = _small(default, own)
    return getattr(config, PARTS.get(f"{sweep}/{kind}", ""), config)


def _small(default: Any, own: dict[str, Any]) -> Any:
    values, other_names = vars(default), type(default).attribute_map
    names = {field.name for field in dataclasses.fields(default)} | other_names.keys()
    sizes = {n: size for n, size in SMALL.items() if n in names and _is_like(values.get(other_names.get(n, n)), size)}
    if "kv_lora_rank" in sizes:  # latent attention has no groups of heads
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    parts = {}
    for name in getattr(default, "sub_configs", {}):
        part = own.get(name)
        if values.get(name) is not None and (part is None or (isinstance(part, dict) and "model_type" not in part)):
            part = _small(values[name], (TOWER if _is_tower(name) else {}) | (part or {}))
        parts[name] = part
    given = {other_names.get(name, name): value for name, value in sizes.items()}
    given |= {n: v for n, v in own.items() if n not in TOWER or n in names}
    return type(default)(**copy.deepcopy(given) | parts)


def _is_tower(name: str) -> bool:
    return name.startswith(("vision", "audio", "image", "text_encoder"))


def _is_like(value: Any, size: Any) -> bool:
    return type(value) is type(size) and (not isinstance(size, tuple) or len(value) == len(size))
