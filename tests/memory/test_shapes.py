"""Shapes from configs: every number against transformers' own model, and against the published totals."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mft.memory.shapes import known_config, known_models, shape_from_config
from mft.models.linears import layer_stacks

# Parameters, as the models' cards and checkpoints have them.
PUBLISHED = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "mistral-7b": 7_248_023_552,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "smollm2-135m": 134_515_008,
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
    assert len(stack) == shape.layers
    assert sum(p.numel() for p in stack[0].parameters()) == shape.linear_weights + shape.layer_rest
    assert shape.parameters == model.num_parameters()


def test_all_published_models_are_shipped():
    assert set(known_models()) == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shipped_config_is_the_published_model(name):
    shape = shape_from_config(known_config(name), name)
    assert shape.parameters == PUBLISHED[name]
    assert_same_shapes(shape, on_meta(known_config(name)))


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
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 100}
    config = sizes | {"num_attention_heads": 4, "num_key_value_heads": 2} | changes
    assert_same_shapes(shape_from_config(config), on_meta(config))


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
    with pytest.raises(ValueError, match="target_modules must name linear layers of llama2-7b.*did you mean q_proj"):
        shape.targets(["qproj"])


def test_what_is_refused():
    config = known_config("llama2-7b")
    with pytest.raises(ValueError, match="model must be of a family whose layers are known here.*model_type='gpt2'"):
        shape_from_config({"model_type": "gpt2"})
    with pytest.raises(ValueError, match="hidden_size must be a positive integer in the config of mine, got None"):
        shape_from_config(config | {"hidden_size": None}, "mine")
    with pytest.raises(ValueError, match="dtype must be one of float32, float16, bfloat16, got 'int8'"):
        shape_from_config(config, dtype="int8")
    with pytest.raises(ValueError, match="did you mean llama2-7b"):
        known_config("lama2-7b")
