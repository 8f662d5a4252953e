"""mask_model and merge_model on tiny models of every supported kind, and on what must be refused."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D

from mft.config import MaskConfig
from mft.masks.convert import (
    mask_model,
    masked_modules,
    merge_model,
    print_trainable_parameters,
    trainable_parameters,
)
from mft_kernels import MaskedLinear

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


class LinearExperts(nn.Module):
    """Mixtral's experts as linear layers, as checkpoints with their own code and older transformers have them."""

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
# Factory, prefix of the decoder layers, linears of one layer.
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


@pytest.fixture
def tokens():
    return torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))


def names(model):
    return list(masked_modules(model))


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# ---------------------------------------------------------------------------------------------- every architecture


@pytest.mark.parametrize("kind", MODELS)
class TestEveryArchitecture:
    def test_attention_and_mlp_are_masked_and_nothing_else(self, kind):
        build, layers, linears = MODELS[kind]
        model = mask_model(build(), MaskConfig())
        assert names(model) == [f"{layers}.{index}.{linear}" for index in range(3) for linear in linears]

    def test_all_but_the_scores_is_frozen_and_every_score_gets_a_gradient(self, kind, tokens):
        model = mask_model(MODELS[kind][0](), MaskConfig(layers_to_transform=[1, 2]))
        model(input_ids=tokens, labels=tokens).loss.backward()
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {f"{name}.scores" for name in names(model)}
        assert {name for name, p in model.named_parameters() if p.grad is not None} == trained

    def test_keeping_everything_computes_what_the_base_computes(self, kind, tokens):
        base = MODELS[kind][0]().eval()
        masked = mask_model(copy.deepcopy(base), MaskConfig(keep_ratio=1.0))
        torch.testing.assert_close(masked(input_ids=tokens).logits, base(input_ids=tokens).logits)

    def test_merging_gives_the_original_classes_with_kept_weights_bit_equal(self, kind, tokens):
        base = MODELS[kind][0]().eval()
        model = mask_model(copy.deepcopy(base), MaskConfig.paper(keep_ratio=0.7))
        expected = state(base)
        for name, module in masked_modules(model).items():
            mask = module.mask()
            is_conv = isinstance(base.get_submodule(name), Conv1D)
            expected[f"{name}.weight"].masked_fill_(~(mask.t() if is_conv else mask), 0.0)
        logits = model(input_ids=tokens).logits
        assert merge_model(model) is model
        assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
        merged = state(model)
        assert merged.keys() == expected.keys()
        for name in merged:
            assert torch.equal(merged[name].view(torch.int32), expected[name].view(torch.int32)), name
        torch.testing.assert_close(model(input_ids=tokens).logits, logits)


def test_dropped_negative_weights_merge_to_positive_zero():
    model = llama()
    nn.init.constant_(model.model.layers[0].mlp.up_proj.weight, -1.0)
    merge_model(mask_model(model, MaskConfig.paper(target_modules=["up_proj"], keep_ratio=0.5)))
    weight = model.model.layers[0].mlp.up_proj.weight
    assert (weight == 0).any()
    assert not torch.signbit(weight[weight == 0]).any()


def test_weights_are_shared_with_the_base_not_copied():
    model = llama()
    address = model.model.layers[0].mlp.up_proj.weight.data_ptr()
    mask_model(model, MaskConfig())
    assert model.model.layers[0].mlp.up_proj.weight.data_ptr() == address


def test_a_routed_seq2seq_model_is_masked_in_its_linear_experts():
    config = SwitchTransformersConfig(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        num_experts=3,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
    )
    model = mask_model(SwitchTransformersForConditionalGeneration(config), MaskConfig())
    stacks, sparse_layers, experts, linears = 2, 1, 3, 2
    assert sum(".experts.expert_" in name for name in names(model)) == stacks * sparse_layers * experts * linears
    assert not [name for name in names(model) if "router" in name or "lm_head" in name]


# ---------------------------------------------------------------------------------------------- choosing layers


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"target_modules": ["q_proj"]}, [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]),
        (
            {"target_modules": ["self_attn.q_proj", "1.mlp.up_proj"]},
            [
                "model.layers.0.self_attn.q_proj",
                "model.layers.1.self_attn.q_proj",
                "model.layers.1.mlp.up_proj",
                "model.layers.2.self_attn.q_proj",
            ],
        ),
        (
            {"target_modules": r".*\.(q|k)_proj", "layers_to_transform": 2},
            ["model.layers.2.self_attn.q_proj", "model.layers.2.self_attn.k_proj"],
        ),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
            ["model.layers.0.self_attn.q_proj", "model.layers.2.self_attn.q_proj"],
        ),
        (
            {"layers_to_transform": 1, "exclude_modules": ["mlp", "k_proj", "v_proj"]},
            ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.o_proj"],
        ),
        (
            {"layers_to_transform": 1, "exclude_modules": r".*mlp.*|.*\.[kv]_proj"},
            ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.o_proj"],
        ),
        (
            {"target_modules": "all-linear"},
            [f"model.layers.{i}.{linear}" for i in range(3) for linear in LLAMA_LINEARS],
        ),
        ({"target_modules": ".*"}, [f"model.layers.{i}.{linear}" for i in range(3) for linear in LLAMA_LINEARS]),
    ],
)
def test_target_modules_choose_as_in_peft_and_never_the_head(config, expected):
    assert names(mask_model(llama(), MaskConfig(**config))) == expected


def test_the_layer_number_is_the_decoder_layers_not_the_experts():
    model = mask_model(mixtral_of_linears(), MaskConfig(target_modules=["w1"], layers_to_transform=[1]))
    assert names(model) == [f"model.layers.1.mlp.experts.experts.{expert}.w1" for expert in range(4)]


def test_the_decoder_layers_are_the_list_as_long_as_the_config_says():
    model = llama()
    model.model.side_attention = nn.ModuleList(nn.Linear(32, 32) for _ in range(5))
    with pytest.raises(ValueError, match=r"must lie in 0 to 2 \(model.layers has 3 layers\), got 4"):
        mask_model(model, MaskConfig(layers_to_transform=4))
    assert not [name for name in names(mask_model(model, MaskConfig())) if "side" in name]


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.choose = nn.Linear(8, 2)


class Toy(nn.Module):
    """Layers with experts of linears, and two kinds of routers, without a config."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Module() for _ in range(2))
        for block in self.blocks:
            block.mlp = nn.Module()
            block.mlp.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
            block.mlp.gate = nn.Linear(8, 4)
            block.mlp.pick = Router()
            block.norm_scale = nn.Linear(8, 8)


def test_experts_count_as_mlp_of_their_layer_and_routers_do_not():
    expected = [f"blocks.1.mlp.experts.{expert}" for expert in range(4)]
    config = MaskConfig(layers_to_transform=1, exclude_modules=["norm_scale"])
    assert names(mask_model(Toy(), config)) == expected
    with pytest.raises(ValueError, match=r"must lie in 0 to 1 \(blocks has 2 layers\), got 2"):
        mask_model(Toy(), MaskConfig(layers_to_transform=2))


def test_what_the_default_leaves_out_of_a_layer_is_named_but_for_routers():
    with pytest.warns(UserWarning, match=r"leaves out .*: norm_scale \(blocks.0.norm_scale and 1 more\)") as told:
        mask_model(Toy(), MaskConfig())
    assert len(told) == 1


@pytest.mark.parametrize("act", ["relu", "gated-gelu"])
def test_the_default_takes_t5s_mlps_of_both_stacks_by_their_shapes(act):
    config = T5Config(**TOKENS, d_model=32, d_kv=8, d_ff=48, num_heads=4, num_layers=2, feed_forward_proj=act)
    config.num_decoder_layers = 3
    model = mask_model(T5ForConditionalGeneration(config), MaskConfig())
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert linears == {"lm_head"}  # all others are masked
    assert len([name for name in names(model) if ".wo" in name]) == 5


def test_a_block_that_narrows_is_no_mlp():
    """Adapters and low-rank projections go down before they go up."""
    model = Toy()
    for block in model.blocks:
        block.adapter = nn.Module()
        block.adapter.down, block.adapter.up = nn.Linear(8, 2), nn.Linear(2, 8)
    with pytest.warns(UserWarning, match="down, norm_scale, up"):
        masked = names(mask_model(model, MaskConfig()))
    assert not [name for name in masked if "adapter" in name]


def test_all_linear_reaches_layers_outside_the_decoder_layers():
    assert {"model.decoder.project_in", "model.decoder.project_out"} <= set(
        names(mask_model(opt(), MaskConfig(target_modules="all-linear")))
    )


def test_scores_depend_on_seed_and_name_not_on_what_else_is_masked():
    def scores(**config):
        return masked_modules(mask_model(llama(), MaskConfig.paper(**config)))["model.layers.1.mlp.up_proj"].scores

    alone = scores(target_modules=["up_proj"], layers_to_transform=1, seed=3)
    torch.manual_seed(99)
    assert torch.equal(alone, scores(seed=3))
    assert not torch.equal(alone, scores(seed=4))
    other = mask_model(llama(), MaskConfig.paper(seed=3)).model.layers[0].mlp.up_proj.scores
    assert not torch.equal(alone, other)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"target_modules": ["q_porj"]},
            r"'q_porj' matches no linear layer; did you mean q_proj\?; linear layers here: "
            "down_proj, gate_proj, k_proj",
        ),
        ({"target_modules": ["q_proj", "c_attn"]}, "'c_attn' matches no linear layer"),
        (
            {"target_modules": "q_proj"},
            r"one string is a regular expression for the full name; for a suffix pass a list, "
            r"\['q_proj'\]",
        ),
        ({"target_modules": "all-liner"}, "did you mean all-linear?"),
        ({"target_modules": r"model.layers.0.self_attn.q_porj"}, "did you mean model.layers.0.self_attn.q_proj"),
        ({"target_modules": "(q_proj"}, "regular expression for the full module name, and '.q_proj' is none"),
        ({"target_modules": ["self_attn"]}, r"names model.layers.0.self_attn \(LlamaAttention\), not a linear layer"),
        ({"target_modules": ["embed_tokens"]}, r"names model.embed_tokens \(Embedding\), not a linear layer"),
        (
            {"target_modules": ["lm_head"]},
            "matches only the output embedding lm_head, which is never masked: masks are",
        ),
        ({"target_modules": ["q_proj", "lm_head"]}, "matches only the output embedding"),
        ({"target_modules": "lm_head"}, "matches only the output embedding"),
        ({"layers_to_transform": 3}, r"must lie in 0 to 2 \(model.layers has 3 layers\), got 3"),
        ({"layers_to_transform": [1, 7, 9]}, "got 7, 9"),
        ({"exclude_modules": ["mpl"]}, r"exclude_modules: 'mpl' matches no linear layer"),
        (
            {"target_modules": ["q_proj"], "exclude_modules": ["self_attn"]},
            r"'q_proj' matches model.layers.0.self_attn.q_proj, .* but exclude_modules=\['self_attn'\] leaves none",
        ),
    ],
)
def test_a_choice_that_selects_nothing_is_an_error_with_candidates(config, message):
    model = llama()
    with pytest.raises(ValueError, match=message):
        mask_model(model, MaskConfig(**config))
    assert not names(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_without_decoder_layers_needs_target_modules():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(ValueError, match="target_modules must be given for this model"):
        mask_model(model, MaskConfig())
    with pytest.raises(ValueError, match="layers_to_transform needs a model with a list of decoder layers"):
        mask_model(model, MaskConfig(target_modules="all-linear", layers_to_transform=0))
    assert names(mask_model(model, MaskConfig(target_modules=["0"]))) == ["0"]


# ---------------------------------------------------------------------------------------------- what is refused


def test_experts_stored_as_one_parameter_are_refused_not_ignored():
    for config in (MaskConfig(), MaskConfig(target_modules="all-linear"), MaskConfig(target_modules=["down_proj"])):
        with pytest.raises(ValueError, match=r"experts.\w+: it is one parameter \(4, \d+, \d+\) of Mixtral") as error:
            mask_model(mixtral(), config)
        assert "exclude_modules=['experts']" in str(error.value)
    with pytest.raises(ValueError, match=r"'experts' names model.layers.0.mlp.experts \(MixtralExperts\)"):
        mask_model(mixtral(), MaskConfig(target_modules=["experts"]))


def test_leaving_stacked_experts_out_explicitly_masks_the_rest():
    model = mask_model(qwen2_moe(), MaskConfig(exclude_modules=["experts"]))
    assert names(model)[:7] == [f"model.layers.0.self_attn.{p}_proj" for p in "qkvo"] + [
        f"model.layers.0.mlp.shared_expert.{p}_proj" for p in ("gate", "up", "down")
    ]


def test_layers_below_the_first_sparse_one_need_no_exclusion():
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
    with pytest.raises(ValueError, match=r"layers.2.mlp.experts.gate_up_proj: it is one parameter"):
        mask_model(DeepseekV3ForCausalLM(config), MaskConfig())


def test_a_weight_tied_to_another_layer_is_refused():
    model = llama()
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ValueError, match=r"layers.0.mlp.up_proj: its weight is tied to model.layers.2.mlp.up_proj.wei"):
        mask_model(model, MaskConfig())
    assert names(mask_model(model, MaskConfig(layers_to_transform=1)))


def test_a_layer_used_in_two_places_is_refused():
    model = llama()
    model.model.layers[2].mlp.up_proj = model.model.layers[0].mlp.up_proj
    with pytest.raises(ValueError, match=r"tied to model.layers.2.mlp.up_proj.weight"):
        mask_model(model, MaskConfig())


def test_a_tied_head_stays_tied_to_the_embedding():
    model = mask_model(llama(tie_word_embeddings=True), MaskConfig(target_modules="all-linear"))
    assert not [name for name in names(model) if "lm_head" in name]
    merge_model(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


class Linear4bit(nn.Linear):
    """As bitsandbytes has it: a subclass of nn.Linear whose forward reads packed weights."""

    def forward(self, x):
        raise NotImplementedError


class NamedLinear(nn.Linear):
    """Computes as nn.Linear does."""


class LoraLinear(nn.Module):
    """As PEFT has it: the wrapped layer inside."""

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
    assert type(merge_model(model).model.layers[1].mlp.up_proj) is nn.Linear


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


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")  # the merged model's
def test_torchs_own_encoder_computes_with_its_masks():
    """Its inference fast path reads the layers' weights; with padding the batch is nested on the way there."""
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


def test_a_layer_whose_parent_reads_its_weight_is_refused():
    model = encoder()
    with pytest.raises(ValueError, match=r"layers.0.self_attn.out_proj: nn.MultiheadAttention computes with out_proj"):
        mask_model(model, MaskConfig(target_modules=["out_proj"]))
    assert not masked_modules(model)


def test_masking_twice_is_refused():
    model = mask_model(llama(), MaskConfig(layers_to_transform=0))
    with pytest.raises(ValueError, match=r"must not be masked already, got 7 masked layers \(model.layers.0.self_attn"):
        mask_model(model, MaskConfig(layers_to_transform=1))


def test_wrapped_models_and_other_things_are_refused():
    with pytest.raises(ValueError, match="wrapped in OptimizedModule: mask it before torch.compile"):
        mask_model(torch.compile(llama()), MaskConfig())
    with pytest.raises(TypeError, match="model must be an nn.Module, got str"):
        mask_model("llama", MaskConfig())


def test_merging_a_plain_model_is_an_error():
    with pytest.raises(ValueError, match="no masked layers to merge, got a plain LlamaForCausalLM"):
        merge_model(llama())


def test_nan_scores_name_the_layer_and_leave_the_model_masked():
    model = mask_model(llama(), MaskConfig())
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.scores[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.up_proj"):
        merge_model(model)
    assert len(names(model)) == 21


# ---------------------------------------------------------------------------------------------- state around it


def test_merging_makes_trainable_again_what_was_trainable_before():
    model = llama()
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    merge_model(mask_model(model, MaskConfig()))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_training_mode_dtype_and_name_carry_over():
    model = mask_model(llama().to(torch.bfloat16).eval(), MaskConfig.paper())
    module = model.model.layers[1].mlp.up_proj
    assert not module.training
    assert module.module_name == "model.layers.1.mlp.up_proj"
    assert (module.weight.dtype, module.scores.dtype) == (torch.bfloat16, torch.float32)
    merge_model(model.train())
    assert model.model.layers[1].mlp.up_proj.training
    assert model.model.layers[1].mlp.up_proj.weight.dtype == torch.bfloat16


def test_a_masked_model_copies_and_pickles(tokens):
    model = mask_model(gpt2().eval(), MaskConfig.paper(layers_to_transform=[1]))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(tokens).logits, model(tokens).logits)
        assert type(merge_model(other).transformer.h[1].mlp.c_fc) is Conv1D
    assert isinstance(model.transformer.h[1].mlp.c_fc, MaskedLinear)


def test_counts_are_the_scores_over_everything(capsys):
    model = mask_model(llama(), MaskConfig(target_modules=["up_proj"], layers_to_transform=0))
    total = sum(p.numel() for p in model.parameters())
    assert trainable_parameters(model) == (32 * 48, total)
    print_trainable_parameters(model)
    assert capsys.readouterr().out == (
        f"trainable params: 1,536 || all params: {total:,} || trainable%: {100 * 1536 / total:.4f}\n"
    )


# ---------------------------------------------------------------------------------------------- training


def score_grads(model, tokens):
    model.zero_grad()
    model(input_ids=tokens, labels=tokens).loss.backward()
    return {name: module.scores.grad.clone() for name, module in masked_modules(model).items()}


def checkpoint_activations(model, use_reentrant):
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": use_reentrant})


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2", "opt"])
def test_gradient_checkpointing_changes_no_gradient(kind, use_reentrant, first, tokens):
    model = MODELS[kind][0]().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.attention_dropout = 0.0
    for module in model.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    mask_model(model, MaskConfig.paper(layers_to_transform=list(range(first, 3))))
    expected = score_grads(model, tokens)
    checkpoint_activations(model, use_reentrant)
    for grads in (score_grads(model, tokens), score_grads(model, tokens)):
        assert grads.keys() == expected.keys()
        for name in grads:
            torch.testing.assert_close(grads[name], expected[name])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_under_checkpointing_layers_below_the_first_masked_one_run_without_autograd(use_reentrant, tokens):
    model = mask_model(llama().train(), MaskConfig.paper(layers_to_transform=[2]))
    checkpoint_activations(model, use_reentrant)
    outputs, runs = {}, {0: 0, 1: 0, 2: 0}
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda m, a, out, i=index: outputs.update({i: out}))
        layer.input_layernorm.register_forward_hook(lambda m, a, out, i=index: runs.update({i: runs[i] + 1}))
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert [outputs[i].grad_fn is None for i in range(3)] == [True, True, False]
    assert runs == {0: 1, 1: 1, 2: 2}  # only the masked layer is recomputed


def test_a_trainable_embedding_still_gets_its_gradient_under_checkpointing(tokens):
    model = mask_model(llama().train(), MaskConfig(layers_to_transform=[2]))
    model.model.embed_tokens.weight.requires_grad_(True)
    checkpoint_activations(model, True)
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0
    assert all(layer.gradient_checkpointing for layer in model.model.layers)  # the prefix has a backward pass too


def test_a_masked_model_compiles_as_one_graph_and_checkpointing_switches_off_again(tokens):
    model = mask_model(llama().train(), MaskConfig.paper(layers_to_transform=[1]))
    expected = score_grads(model, tokens)
    checkpoint_activations(model, True)
    score_grads(model, tokens)
    getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    compiled(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    for name, module in masked_modules(model).items():
        torch.testing.assert_close(module.scores.grad, expected[name])


def test_merging_takes_the_hooks_away(tokens):
    model = mask_model(llama().train(), MaskConfig.paper(layers_to_transform=[2]))
    merge_model(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_masked_model_trains_under_the_transformers_trainer(tmp_path, tokens, checkpointing):
    model = mask_model(llama(), MaskConfig.paper(layers_to_transform=[1, 2]))
    before = state(model)
    rows = [{"input_ids": row, "labels": row} for row in tokens.repeat(4, 1)]
    has_new_name = "activation_checkpointing" in inspect.signature(TrainingArguments).parameters
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        logging_nan_inf_filter=False,
        dataloader_pin_memory=False,
        **{"activation_checkpointing" if has_new_name else "gradient_checkpointing": checkpointing},
    )
    result = Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert result.global_step == 3
    after = state(model)
    for name in before:
        assert torch.equal(before[name], after[name]) != name.endswith(".scores"), name
