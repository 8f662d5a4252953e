"""GGUF files of small random models in every ggml type, and as transformers reads them."""

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import quants
from transformers import (
    AutoModelForCausalLM,
    GgufConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from mft.config import MaskConfig
from mft.masks.convert import mask_model, merge_model
from mft.masks.export import save_masks

TOKENS = torch.arange(3, 35).reshape(2, 16)
SCALE_AT = {"Q6_K": 208, "Q3_K": 108, "Q4_K": 0, "Q5_K": 0, "Q2_K": 80, "IQ4_NL": 0, "IQ2_XS": 0}  # float16 scale
_SIZES = {"vocab_size": 64, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2}


def make(family, **changes):
    """Return a random model of a family, 256 wide, so that rows are whole blocks of every type."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {**_SIZES, **_TOKENS, "intermediate_size": 256, "num_key_value_heads": 2, "head_dim": 64}
        sizes["max_position_embeddings"] = 64
        if family == "llama":
            return LlamaForCausalLM(LlamaConfig(**sizes | changes)).eval()
        if family == "qwen2":
            del sizes["head_dim"]
            return Qwen2ForCausalLM(Qwen2Config(**sizes | changes)).eval()
        if family == "qwen3moe":
            experts = {
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 768,
            }  # transformers reads only these sizes
            return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes | experts | changes)).eval()
        sizes = {"vocab_size": 64, "n_embd": 64, "n_layer": 2, "n_head": 4}
        return GPT2LMHeadModel(GPT2Config(**sizes | _TOKENS | changes)).eval()


def quantized(values, kind):
    """Return float32 (..., K) as uint8 blocks of a type; if gguf cannot quantise to it, random codes at their scale."""
    try:
        return quants.quantize(values, Kind[kind])
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[Kind[kind]]
        codes = np.random.default_rng(values.size).integers(0, 256, (values.size // block, size), dtype=np.uint8)
        codes[:, SCALE_AT[kind] : SCALE_AT[kind] + 2] = np.array([1e-4], np.float16).view(np.uint8)
        if kind in ("Q2_K", "Q4_K", "Q5_K"):
            codes[:, SCALE_AT[kind] + 2 : SCALE_AT[kind] + 4] = np.array([1e-4], np.float16).view(np.uint8)
        return codes.reshape(*values.shape[:-1], -1)


def write_gguf(model, path, kind="F32", tied=False):
    """Write a model like llama.cpp's converter: names from gguf's table, q and k of a Llama in its rotation order.

    kind: type of the linear layers; all else is float32. tied: without the head.
    """
    config = model.config
    family = {"qwen3_moe": "qwen3moe"}.get(config.model_type, config.model_type)
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, family)
    _describe(writer, config)
    for name, values in _stored(model, family).items():
        if tied and name == "lm_head.weight":
            continue
        called = names.get_name(name, try_suffixes=(".weight", ".bias"))
        called += ".weight" if called.endswith("_exps") else ""
        is_linear = values.ndim > 1 and not any(part in name for part in ("embed", "wte", "wpe", "mlp.gate."))
        if not is_linear or kind == "F32":
            writer.add_tensor(called, values)
        elif kind == "F16":
            writer.add_tensor(called, values.astype(np.float16))
        else:
            writer.add_tensor(called, quantized(values, kind), raw_dtype=Kind[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_gguf(path, dtype=torch.float32):
    options = {"gguf_file": str(path), "dtype": dtype, "quantization_config": GgufConfig(dequantize=True)}
    return AutoModelForCausalLM.from_pretrained(path.parent, **options).eval()


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


def mask_of(path, directory, seed=1, **mask):
    """Return (masks of a tenth of a file's weights, as transformers reads them; logits with the mask on the base)."""
    model = mask_model(read_gguf(path), MaskConfig(**{"keep_ratio": 0.9, "init": "normal", "seed": seed} | mask))
    save_masks(model, directory)
    return directory, logits(merge_model(model))


def _describe(writer, config):
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        writer.add_token_list([str(number) for number in range(config.vocab_size)])
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    if config.model_type == "qwen3_moe":
        writer.add_key_length(64)
        writer.add_value_length(64)
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def _stored(model, family):
    """Return {name: values} as the converter lays them out."""
    stored = {}
    for name, tensor in model.state_dict().items():
        part = name.split(".")[-2]
        if family == "llama" and part in ("q_proj", "k_proj"):
            heads = model.config.num_attention_heads if part == "q_proj" else model.config.num_key_value_heads
            tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)
        if family == "gpt2" and tensor.dim() == 2 and ".h." in name:
            tensor = tensor.t()
        if name.endswith("experts.gate_up_proj"):
            gate, up = tensor.chunk(2, 1)
            stored[name.replace("gate_up", "gate")], stored[name.replace("gate_up", "up")] = gate, up
            continue
        stored[name] = tensor
    return {name: tensor.contiguous().float().numpy() for name, tensor in stored.items()}
