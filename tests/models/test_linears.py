"""The linear layers of a model, their decoder layer, and those that cannot be masked, with name and reason."""

import copy

import pytest
import torch
from tiny_architectures import SIZES, llama, mixtral, mixtral_of_linears, names, qwen2_moe
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from mft.config import MaskConfig
from mft.masks.convert import mask_model, masked_modules, merge_model


def test_the_layer_number_is_the_decoder_layers_not_the_experts():
    model = mask_model(mixtral_of_linears(), MaskConfig(target_modules=["w1"], layers_to_transform=[1]))
    assert names(model) == [f"model.layers.1.mlp.experts.experts.{expert}.w1" for expert in range(4)]


def test_the_decoder_layers_are_the_list_as_long_as_the_config_says():
    model = llama()
    model.model.side_attention = nn.ModuleList(nn.Linear(32, 32) for _ in range(5))
    with pytest.raises(ValueError, match=r"must lie in 0 to 2 \(model.layers has 3 layers\), got 4"):
        mask_model(model, MaskConfig(layers_to_transform=4))
    assert not [name for name in names(mask_model(model, MaskConfig())) if "side" in name]


# ---------------------------------------------------------------------------------------------- what is refused


def test_experts_of_a_class_that_nobody_knows_are_refused_not_ignored():
    model = mixtral()
    for layer in model.model.layers:
        del layer.mlp.experts.has_gate  # a flag of transformers' interface
    for config in (MaskConfig(), MaskConfig(target_modules="all-linear"), MaskConfig(target_modules=["down_proj"])):
        with pytest.raises(ValueError, match=r"experts.\w+: it is one parameter \(4, \d+, \d+\) of Mixtral") as error:
            mask_model(model, config)
        assert "down_proj" in str(error.value).partition("exclude_modules=")[2]
    with pytest.raises(ValueError, match=r"'experts' names model.layers.0.mlp.experts \(MixtralExperts\)"):
        mask_model(model, MaskConfig(target_modules=["experts"]))
    assert names(mask_model(model, MaskConfig(exclude_modules=["experts"])))


def test_experts_in_blocks_of_codes_are_refused_not_ignored():
    """MXFP4 checkpoints of GPT-OSS hold them so, unless they are made exact."""
    model = mixtral()
    for layer in model.model.layers:
        experts = layer.mlp.experts
        del experts.gate_up_proj
        experts.gate_up_proj_blocks = nn.Parameter(torch.zeros(4, 96, 2, 16, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"experts.gate_up_proj_blocks: it is one parameter \(4, 96, 2, 16\)"):
        mask_model(model, MaskConfig())
    assert names(mask_model(model, MaskConfig(exclude_modules=["gate_up_proj_blocks"])))


def test_experts_are_named_as_their_parameters_are():
    gate_up, down = (
        [f"model.layers.{i}.mlp.experts.{part}" for i in range(3)] for part in ("gate_up_proj", "down_proj")
    )
    for config in (
        MaskConfig(target_modules=["gate_up_proj"]),
        MaskConfig(target_modules=["experts.gate_up_proj"]),
        MaskConfig(target_parameters=["experts.gate_up_proj"]),
        MaskConfig(target_parameters=["gate_up_proj"]),
        MaskConfig(target_modules=r".*experts\.gate_up_proj"),
    ):
        assert names(mask_model(mixtral(), config)) == gate_up
    both = MaskConfig(target_modules=["q_proj"], target_parameters=["experts.down_proj"], layers_to_transform=[1])
    assert names(mask_model(mixtral(), both)) == ["model.layers.1.self_attn.q_proj", down[1]]
    plain = mask_model(mixtral(), MaskConfig(target_parameters=["q_proj.weight"]))
    assert names(plain) == [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
    everything = names(mask_model(mixtral(), MaskConfig()))
    assert {*gate_up, *down} <= set(everything)


def test_leaving_stacked_experts_out_explicitly_masks_the_rest():
    model = mask_model(qwen2_moe(), MaskConfig(exclude_modules=["experts"]))
    assert names(model)[:7] == [f"model.layers.0.self_attn.{p}_proj" for p in "qkvo"] + [
        f"model.layers.0.mlp.shared_expert.{p}_proj" for p in ("gate", "up", "down")
    ]


def test_dense_layers_and_sparse_ones_beside_each_other():
    config = DeepseekV3Config(
        **SIZES | {"num_key_value_heads": 4},
        moe_intermediate_size=16,
        first_k_dense_replace=2,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=4,
    )
    model = mask_model(DeepseekV3ForCausalLM(config), MaskConfig(layers_to_transform=[0, 1]))
    assert "model.layers.1.mlp.down_proj" in names(model)
    assert not [name for name in names(model) if "experts" in name]
    whole = names(mask_model(DeepseekV3ForCausalLM(config), MaskConfig()))
    assert [name for name in whole if ".experts." in name] == [
        f"model.layers.2.mlp.experts.{part}" for part in ("gate_up_proj", "down_proj")
    ]


def test_a_layer_used_in_two_places_is_refused():
    model = llama()
    model.model.layers[2].mlp.up_proj = model.model.layers[0].mlp.up_proj
    with pytest.raises(ValueError, match=r"tied to model.layers.2.mlp.up_proj.weight"):
        mask_model(model, MaskConfig())


class Linear4bit(nn.Linear):
    """Like bitsandbytes': a subclass of nn.Linear whose forward reads packed weights."""

    def forward(self, x):
        raise NotImplementedError


class NamedLinear(nn.Linear):
    """Inherits nn.Linear's forward."""


class LoraLinear(nn.Module):
    """Like PEFT's: it contains the wrapped layer."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, 2, bias=False)})

    def forward(self, x):
        return self.base_layer(x)


@pytest.mark.parametrize("target_modules", [None, "all-linear", ["up_proj"], r".*layers.1.*"])
def test_quantised_and_adapted_layers_are_refused_by_name_and_type(target_modules):
    config = MaskConfig(target_modules=target_modules)
    for replacement in (Linear4bit, lambda n, k, bias: LoraLinear(nn.Linear(n, k, bias=bias))):
        model = llama()
        model.model.layers[1].mlp.up_proj = replacement(32, 48, bias=False)
        with pytest.raises(ValueError, match=r"mask model.layers.1.mlp.up_proj: it is a \S+Linear\w*, not a plain"):
            mask_model(model, config)


def test_a_subclass_that_computes_as_linear_does_is_masked_as_by_hand():
    model = llama()
    model.model.layers[1].mlp.up_proj = NamedLinear(32, 48, bias=False)
    mask_model(model, MaskConfig(target_modules=["1.mlp.up_proj"]))
    assert type(merge_model(model).model.layers[1].mlp.up_proj) is NamedLinear


def test_the_linears_inside_an_adapter_are_refused_too():
    model = llama()
    model.model.layers[1].mlp.up_proj = LoraLinear(nn.Linear(32, 48, bias=False))
    with pytest.raises(ValueError, match=r"up_proj.base_layer: it belongs to the LoraLinear around it"):
        mask_model(model, MaskConfig(target_modules=["base_layer"]))
    assert "model.layers.1.mlp.up_proj" not in names(mask_model(model, MaskConfig(exclude_modules=["1.mlp.up_proj"])))


def test_integer_weights_hooks_and_offloaded_layers_are_refused():
    model = llama()
    layer = model.model.layers[1].mlp
    layer.up_proj.weight = nn.Parameter(torch.zeros(48, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj: it holds a \w+ of torch.int8: masks need fp32, fp16"):
        mask_model(model, MaskConfig())
    layer.up_proj = nn.Linear(32, 48, bias=False)
    handle = layer.up_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj: it has hooks, which a masked layer would lose"):
        mask_model(model, MaskConfig())
    handle.remove()
    layer.up_proj.forward = lambda x: x
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj: its forward is replaced"):
        mask_model(model, MaskConfig())


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")  # from the merged model
def test_torchs_own_encoder_computes_with_its_masks():
    """Its inference fast path reads the layers' weights; with padding, the batch is nested on the way."""
    model = mask_model(encoder(), MaskConfig(target_modules=["linear1", "linear2"], keep_ratio=0.5))
    x, padding = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    trained = model(x, src_key_padding_mask=padding)  # in eval mode, with gradients
    trained.sum().backward()
    assert all(module.scores.grad is not None for module in masked_modules(model).values())
    merged = merge_model(copy.deepcopy(model))
    with torch.no_grad():
        for masking in (None, padding):
            y, expected = (m(x, src_key_padding_mask=masking) for m in (model, merged))
            torch.testing.assert_close(y[~padding], expected[~padding])
