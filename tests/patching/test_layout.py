"""Where masked weights are in a file: as transformers reads it, with rows that it reorders, transposes and fuses."""

import json

import gguf
import numpy as np
import pytest
import torch
from gguf_models import logits, make, mask_of, read_gguf, write_gguf

from mft.config import MaskConfig
from mft.files.gguf_file import read_gguf_header
from mft.masks.convert import mask_model
from mft.masks.export import save_masks
from mft.patching.layout import Layout
from mft.patching.outline import gguf_outline
from mft.patching.patch import patch_gguf
from mft.patching.plan import plan_patch, tensor_values


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "qwen3moe"])
def test_a_patched_file_is_the_mask_on_the_base_in_each_family(family, tmp_path):
    path = write_gguf(make(family), tmp_path / "model.gguf")
    masks, expected = mask_of(path, tmp_path / "masks")
    patched = patch_gguf(path, masks, tmp_path / "out.gguf")
    assert "is the base of the masks" in patched.base
    found = read_gguf(tmp_path / "out.gguf")
    assert torch.equal(logits(found), expected)


def layout_of(path, layers):
    header = read_gguf_header(path)
    return header, Layout(path, header, gguf_outline(path, header), layers)


@pytest.mark.parametrize(("family", "turned"), [("llama", True), ("qwen2", False)])
def test_rows_of_q_are_turned_for_a_llama_and_not_for_a_qwen(family, turned, tmp_path):
    path = write_gguf(make(family), tmp_path / "model.gguf")
    name = "model.layers.1.self_attn.q_proj"
    _, layout = layout_of(path, {name: (256, 256)})
    row = np.arange(256)  # the second row of the first head
    ((tensor, elements),) = layout.elements(name, 256 + row)
    assert tensor.name == "blk.1.attn_q.weight"
    assert np.array_equal(elements, (2 if turned else 1) * 256 + row)


def test_an_experts_gate_and_up_are_two_tensors(tmp_path):
    path = write_gguf(make("qwen3moe"), tmp_path / "model.gguf")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    _, layout = layout_of(path, {name: (4, 1536, 256)})
    # For expert 1: the first weight of gate, and the last of up.
    found = {tensor.name: elements.tolist() for tensor, elements in layout.elements(name, np.array([393216, 786431]))}
    assert found == {"blk.0.ffn_gate_exps.weight": [196608], "blk.0.ffn_up_exps.weight": [393215]}


def test_weights_come_out_as_transformers_has_them(tmp_path):
    for family, name in (
        ("llama", "model.layers.0.self_attn.k_proj"),
        ("gpt2", "transformer.h.1.attn.c_attn"),
        ("qwen3moe", "model.layers.1.mlp.experts.gate_up_proj"),
    ):
        path = write_gguf(make(family), tmp_path / f"{family}.gguf")
        model = read_gguf(path)
        weight = model.get_parameter(name if "experts" in name else f"{name}.weight").detach()
        weight = weight.t() if family == "gpt2" else weight
        _, layout = layout_of(path, {name: tuple(weight.shape)})
        values = {tensor.name: tensor_values(path, tensor) for tensor in layout.tensors[name]}
        assert np.array_equal(layout.weight(name, values), weight.numpy())


def renamed(directory, old, new, shape=None):
    """Rename one layer in an export. The export is then inconsistent, but reading stops before that matters."""
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    for entry in config["modules"]:
        if entry["name"] == old:
            entry["name"] = new
            entry["shape"], entry["kept"] = shape or entry["shape"], 0
    path.write_text(json.dumps(config))
    return directory


def test_a_mask_on_a_tied_head_is_refused(tmp_path):
    model = make("llama", tie_word_embeddings=True)
    path = write_gguf(model, tmp_path / "model.gguf", tied=True)
    masks = save_masks(mask_model(model, MaskConfig(keep_ratio=0.9)), tmp_path / "masks")
    renamed(masks, "model.layers.0.mlp.up_proj", "lm_head", [64, 256])
    with pytest.raises(ValueError, match="lm_head must have a tensor of its own to be masked, got one that shares"):
        plan_patch(path, masks)


def test_a_head_of_its_own_can_be_masked(tmp_path):
    path = write_gguf(make("llama"), tmp_path / "model.gguf")
    _, layout = layout_of(path, {"lm_head": (64, 256)})
    ((tensor, elements),) = layout.elements("lm_head", np.array([5, 300]))
    assert (tensor.name, elements.tolist()) == ("output.weight", [5, 300])


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.layers.7.mlp.up_proj", [256, 256], "masks must be for layers of this model, a LlamaForCausalLM"),
        ("model.layers.0.mlp.up_porj", [256, 256], "got one for 'model.layers.0.mlp.up_porj'"),
        ("model.layers.0.mlp.up_proj", [128, 256], r"a weight of \(128, 256\), as its mask, got \(256, 256\)"),
    ],
)
def test_a_mask_for_another_model_is_refused_by_its_layer(name, shape, message, tmp_path):
    path = write_gguf(make("llama"), tmp_path / "model.gguf")
    masks, _ = mask_of(path, tmp_path / "masks")
    renamed(masks, "model.layers.0.mlp.up_proj", name, shape)
    with pytest.raises(ValueError, match=message) as caught:
        plan_patch(path, masks, force=True)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("architecture", ["lfm2", "qwen35"])
def test_an_architecture_that_transformers_reads_otherwise_is_refused(architecture, tmp_path):
    path = write_gguf(make("llama"), tmp_path / "model.gguf")
    masks, _ = mask_of(path, tmp_path / "masks")
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", architecture)
    writer.add_block_count(1)
    writer.add_tensor("blk.0.ffn_up.weight", np.zeros((256, 256), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        ValueError, match=f"renames one by one, got '{architecture}': mft merge writes a model directory"
    ):
        plan_patch(tmp_path / "other.gguf", masks)
