"""Which layers target_modules, exclude_modules and layers_to_transform select, and selections that match nothing."""

import pytest
from tiny_architectures import LLAMA_LINEARS, TOKENS, llama, names, opt
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from mft.config import MaskConfig
from mft.masks.convert import mask_model

FIRST, LAST = "model.layers.0.self_attn.", "model.layers.2.self_attn."
ALL = [f"model.layers.{i}.{linear}" for i in range(3) for linear in LLAMA_LINEARS]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"target_modules": ["q_proj"]}, [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]),
        ({"target_modules": ["0.self_attn.q_proj", "1.mlp.up_proj"]}, [f"{FIRST}q_proj", "model.layers.1.mlp.up_proj"]),
        ({"target_modules": r".*\.(q|k)_proj", "layers_to_transform": 0}, [f"{FIRST}q_proj", f"{FIRST}k_proj"]),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 2]}, [f"{FIRST}q_proj", f"{LAST}q_proj"]),
        (
            {"layers_to_transform": 0, "exclude_modules": ["mlp", "k_proj", "v_proj"]},
            [f"{FIRST}q_proj", f"{FIRST}o_proj"],
        ),
        ({"layers_to_transform": 2, "exclude_modules": r".*mlp.*|.*\.[kv]_proj"}, [f"{LAST}q_proj", f"{LAST}o_proj"]),
        ({"target_modules": "all-linear"}, ALL),
        ({"target_modules": ".*"}, ALL),
    ],
)
def test_target_modules_choose_as_in_peft_and_never_the_head(config, expected):
    assert names(mask_model(llama(), MaskConfig(**config))) == expected


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.choose = nn.Linear(8, 2)


class Toy(nn.Module):
    """Layers with experts of linears, two kinds of routers and an attention's indexer, without a config."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Module() for _ in range(2))
        for block in self.blocks:
            block.mlp = nn.Module()
            block.mlp.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
            block.mlp.gate = nn.Linear(8, 4)
            block.mlp.pick = Router()
            block.norm_scale = nn.Linear(8, 8)
            block.self_attn = nn.Module()
            block.self_attn.indexer = nn.Module()
            block.self_attn.indexer.wq = nn.Linear(8, 8)


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


def test_a_models_name_in_a_class_says_nothing_of_the_class():
    """Otherwise everything in a GraniteMoeHybridMambaLayer would count as an expert's."""
    here = {"__module__": "transformers.models.granite_moe_hybrid.modeling"}
    model = Toy()
    for block in model.blocks:
        block.mamba = type("GraniteMoeHybridMambaLayer", (nn.Module,), here)()
        block.mamba.in_proj = nn.Linear(8, 8)
        block.sparse = type("GraniteMoeHybridMoE", (nn.Module,), here)()
        block.sparse.up = nn.Linear(8, 8)
    with pytest.warns(UserWarning, match="leaves out .*: in_proj, norm_scale"):
        masked = names(mask_model(model, MaskConfig()))
    assert "blocks.0.sparse.up" in masked
    assert "blocks.0.mamba.in_proj" not in masked


@pytest.mark.parametrize("act", ["relu", "gated-gelu"])
def test_the_default_takes_t5s_mlps_of_both_stacks_by_their_shapes(act):
    config = T5Config(**TOKENS, d_model=32, d_kv=8, d_ff=48, num_heads=4, num_layers=2, feed_forward_proj=act)
    config.num_decoder_layers = 3
    model = mask_model(T5ForConditionalGeneration(config), MaskConfig())
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert linears == {"lm_head"}  # all others are masked
    assert len([name for name in names(model) if ".wo" in name]) == 5


def test_a_block_that_narrows_is_no_mlp():
    """Adapters and low-rank projections narrow before they widen."""
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


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": ["q_proj", "c_attn"]}, "'c_attn' matches no linear layer"),
        ({"target_modules": "q_proj"}, r"is a regular expression for the full name; for a suffix pass a list, \['q_pr"),
        ({"target_modules": "all-liner"}, "did you mean all-linear?"),
        ({"target_modules": r"model.layers.0.self_attn.q_porj"}, "did you mean model.layers.0.self_attn.q_proj"),
        ({"target_modules": "(q_proj"}, "regular expression for the full module name, and '.q_proj' is none"),
        ({"target_modules": ["self_attn"]}, r"names model.layers.0.self_attn \(LlamaAttention\), not a linear layer"),
        ({"target_modules": ["embed_tokens"]}, r"names model.embed_tokens \(Embedding\), not a linear layer"),
        ({"target_modules": "lm_head"}, "matches only the output embedding"),
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
    assert names(mask_model(model, MaskConfig(target_modules=["0"], keep_ratio=0.9))) == ["0"]
