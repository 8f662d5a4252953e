"""Tiny models of the architectures that can be masked, and functions that tests call on them."""

import torch
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from mft.masks.convert import masked_modules

TOKENS = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {
    **TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}


def llama(**changes):
    return LlamaForCausalLM(LlamaConfig(**SIZES | changes))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(**TOKENS, n_embd=36, n_layer=3, n_head=4, n_positions=64))


def opt():
    return OPTForCausalLM(
        OPTConfig(
            **TOKENS,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=16,
        )
    )


def mixtral():
    return MixtralForCausalLM(MixtralConfig(**SIZES | EXPERTS))


def qwen2_moe():
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=24
        )
    )


def qwen3_moe(**changes):
    sizes = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES | sizes | changes))


def olmoe(**changes):
    return OlmoeForCausalLM(OlmoeConfig(**SIZES | {"num_experts": 4, "num_experts_per_tok": 2} | changes))


def gpt_oss(**changes):
    model = GptOssForCausalLM(GptOssConfig(**SIZES | EXPERTS | {"head_dim": 8, "sliding_window": 8} | changes))
    for name, parameter in model.named_parameters():
        if name.endswith("_bias"):  # biases begin at 0
            nn.init.normal_(parameter, std=0.1)
    return model


# Experts in one parameter: (E, N, K); (E, N, K) after attention without query norms; transposed, with biases.
MIXTURES = {"qwen3_moe": qwen3_moe, "olmoe": olmoe, "gpt_oss": gpt_oss}


class LinearExperts(nn.Module):
    """Mixtral's experts as linear layers, as in older transformers and in checkpoints with their own code."""

    def __init__(self, stacked):
        super().__init__()
        self.experts, self.act_fn = nn.ModuleList(), stacked.act_fn
        for gate_up, down in zip(stacked.gate_up_proj, stacked.down_proj):
            expert = nn.Module()
            for name, weight in zip(("w1", "w3", "w2"), (*gate_up.chunk(2), down)):
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                linear.weight = nn.Parameter(weight.detach().clone())
                expert.add_module(name, linear)
            self.experts.append(expert)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(top_k_index == number)
            x = hidden_states[token]
            y = expert.w2(self.act_fn(expert.w1(x)) * expert.w3(x))
            out.index_add_(0, token, y * top_k_weights[token, place, None])
        return out


def mixtral_of_linears():
    model = mixtral()
    for layer in model.model.layers:
        layer.mlp.experts = LinearExperts(layer.mlp.experts)
    return model


LLAMA_LINEARS = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]
# Factory, prefix of the decoder layers, and the linears of one layer.
MODELS = {
    "llama": (llama, "model.layers", LLAMA_LINEARS),
    "qwen3": (lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)), "model.layers", LLAMA_LINEARS),
    "gemma3": (lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=8)), "model.layers", LLAMA_LINEARS),
    "opt": (
        opt,
        "model.decoder.layers",
        ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2"],
    ),
    "gpt2": (gpt2, "transformer.h", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
    "mixtral_of_linears": (
        mixtral_of_linears,
        "model.layers",
        LLAMA_LINEARS[:4]
        + [f"mlp.experts.experts.{expert}.{part}" for expert in range(4) for part in ("w1", "w3", "w2")],
    ),
}


def names(model):
    return list(masked_modules(model))


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
