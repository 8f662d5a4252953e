"""Tiny mixtures of experts whose experts are one parameter, and tokens for them."""

import torch
import transformers
from transformers import AutoModelForCausalLM

WORDS = 99
_SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
# One model for each way to store and compute experts: gate and up in one parameter; transposed, with biases and its own
# gate function; every token to every expert; one module per projection; no gate.
KINDS = {
    "Olmoe": {"num_experts": 5, "num_experts_per_tok": 2},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "Llama4Text": {"num_local_experts": 3, "intermediate_size_mlp": 48, "head_dim": 8},
    "JetMoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8},
    "NemotronH": {"hybrid_override_pattern": "E*", "n_routed_experts": 4, "moe_intermediate_size": 24, "head_dim": 8},
}
_OTHERS = {"Qwen3Moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}}
IDS = torch.randint(3, WORDS, (2, 12), generator=torch.Generator().manual_seed(0))


def mixture(kind, **changes):
    """Return a model of this kind in evaluation mode, with random weights and biases."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**_SIZES | (KINDS | _OTHERS)[kind] | changes)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("_bias"):  # biases begin at 0
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@torch.no_grad()
def logits(model, ids=IDS, **options):
    return model(input_ids=ids, use_cache=False, **options).logits
