"""Shapes from configs: every number compared with transformers' own model, and with published totals."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mft.memory.shapes import known_config, known_models, shape_from_config
from mft.models.linears import layer_stacks

# Numbers of parameters, from the models' cards and checkpoints.
PUBLISHED = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "mistral-7b": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "smollm2-135m": 134_515_008,
    "gpt-oss-20b": 20_914_757_184,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
}


def on_meta(config):
    known = AutoConfig.for_model(config["model_type"], **{k: v for k, v in config.items() if k != "model_type"})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(known)


def assert_same_shapes(shape, model):
    (stack,) = layer_stacks(model).values()
    linears = {n: tuple(m.weight.shape) for n, m in stack[0].named_modules() if isinstance(m, torch.nn.Linear)}
    assert list(linears) == list(shape.linears)
    assert linears == shape.linears
    stored = {name: tuple(p.shape) for name, p in stack[0].named_parameters() if p.dim() == 3}
    lie_across = model.config.model_type == "gpt_oss"
    assert stored == {name: (e, k, n) if lie_across else (e, n, k) for name, (e, n, k) in shape.experts.items()}
    assert len(stack) == shape.layers
    assert sum(p.numel() for p in stack[0].parameters()) == shape.layer_weights + shape.layer_rest
    assert shape.parameters == model.num_parameters()


def test_all_published_models_are_shipped():
    assert set(known_models()) == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shipped_config_is_the_published_model(name):
    shape = shape_from_config(known_config(name), name)
    assert shape.parameters == PUBLISHED[name]
    assert_same_shapes(shape, on_meta(known_config(name)))


SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 100}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
        {"model_type": "llama", "head_dim": 48, "tie_word_embeddings": True},
        {"model_type": "qwen2", "tie_word_embeddings": True},
        {"model_type": "qwen3", "attention_bias": True, "head_dim": 16},
        {"model_type": "mistral", "sliding_window": 64},
    ],
    ids=str,
)
def test_biases_heads_and_ties(changes):
    config = SIZES | changes
    assert_same_shapes(shape_from_config(config), on_meta(config))


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"model_type": "mistral", "sliding_window": 64}, 64),
        ({"model_type": "qwen2", "sliding_window": 64}, None),  # written by many, and not used
        ({"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True}, 64),
        ({"model_type": "llama"}, None),
    ],
    ids=str,
)
def test_a_sliding_window_counts_where_it_is_used(changes, window):
    assert shape_from_config(SIZES | changes).sliding_window == window


SMALL_MIXTURE = SIZES | {"moe_intermediate_size": 32, "num_experts_per_tok": 2, "num_experts": 8}


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mixtral", "num_experts": None, "num_local_experts": 4, "head_dim": 48},
        {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 48},
        {"model_type": "qwen3_moe", "attention_bias": True, "head_dim": 32},
        {"model_type": "olmoe", "tie_word_embeddings": True},
        {"model_type": "gpt_oss", "num_experts": None, "num_local_experts": 4, "head_dim": 32},
    ],
    ids=str,
)
def test_mixtures(changes):
    """With the keys of a config.json, and with those of transformers' own dictionary."""
    config = {key: value for key, value in (SMALL_MIXTURE | changes).items() if value is not None}
    model, shape = on_meta(config), shape_from_config(config, "mine")
    assert_same_shapes(shape, model)
    assert shape_from_config(model.config.to_dict(), "mine") == shape


def test_a_token_is_multiplied_by_the_experts_it_is_routed_to():
    """The published counts of active parameters; for gpt-oss without the embedding."""
    for name, active in (("gpt-oss-20b", 3.6e9), ("mixtral-8x7b", 12.9e9), ("qwen3-30b-a3b", 3.3e9)):
        shape = shape_from_config(known_config(name), name)
        used = sum(n * k for n, k in shape.linears.values()) + sum(map(shape.used, shape.experts))
        asleep = shape.layers * (shape.layer_weights - used)
        ours = shape.parameters - asleep - (shape.embedding if name == "gpt-oss-20b" else 0)
        assert ours == pytest.approx(active, rel=0.02)


def test_experts_that_see_a_token():
    mixture = shape_from_config(known_config("qwen3-30b-a3b")).mixture
    assert mixture.busy(1) == pytest.approx(8)
    assert mixture.busy(2) == pytest.approx(8 + 8 * 120 / 128)
    assert mixture.busy(4096) == pytest.approx(128)


def test_smollm2_is_the_one_that_is_fetched(smollm2_dir):
    config = AutoConfig.from_pretrained(smollm2_dir, local_files_only=True).to_dict()
    ours, theirs = (shape_from_config(c, "smollm2-135m") for c in (known_config("smollm2-135m"), config))
    assert ours == theirs


def test_dtype_sets_the_bytes_of_a_weight():
    assert [shape_from_config(known_config("llama2-7b"), dtype=d).dtype_bytes for d in (None, "float32")] == [2, 4]


def test_target_modules_are_suffixes():
    shape = shape_from_config(known_config("llama2-7b"), "llama2-7b")
    assert shape.targets(["down_proj", "self_attn.q_proj"]) == ["self_attn.q_proj", "mlp.down_proj"]
    assert shape.targets(None) == list(shape.linears)
    with pytest.raises(ValueError, match="must name linear layers of llama2-7b.*did you mean q_proj"):
        shape.targets(["qproj"])


def test_what_is_refused():
    config = known_config("llama2-7b")
    with pytest.raises(ValueError, match="model must be of a family whose layers are known here.*model_type='gpt2'"):
        shape_from_config({"model_type": "gpt2"})
    with pytest.raises(ValueError, match="hidden_size must be a positive integer in the config of mine, got None"):
        shape_from_config(config | {"hidden_size": None}, "mine")
    with pytest.raises(ValueError, match="dtype must be one of bfloat16, float32, float16, got 'int8'"):
        shape_from_config(config, dtype="int8")
    with pytest.raises(ValueError, match="did you mean llama2-7b"):
        known_config("lama2-7b")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_only_layers": [0]}, r"in every layer.*mine has dense layers between them \(mlp_only_layers=\[0\]"),
        ({"decoder_sparse_step": 2}, r"mine has dense layers between them \(decoder_sparse_step=2\)"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok must be at most 8, the number of experts.*got 9"),
        ({"num_experts": 0}, "num_experts must be a positive integer in the config of mine, got 0"),
    ],
)
def test_mixtures_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        shape_from_config(SMALL_MIXTURE | {"model_type": "qwen3_moe"} | changes, "mine")


def test_targets_of_a_mixture():
    shape = shape_from_config(known_config("qwen3-30b-a3b"), "qwen3-30b-a3b")
    assert shape.targets(None) == [*shape.linears, "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert shape.targets(["experts.down_proj"]) == shape.targets(["down_proj"]) == ["mlp.experts.down_proj"]
    shared = shape_from_config(SMALL_MIXTURE | {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 48})
    assert "mlp.shared_expert_gate" not in shared.targets(None)
    assert shared.targets(["down_proj"]) == ["mlp.shared_expert.down_proj", "mlp.experts.down_proj"]
    with pytest.raises(ValueError, match="v_proj, o_proj, gate_up_proj, down_proj.*did you mean gate_up_proj"):
        shape.targets(["gateup_proj"])
