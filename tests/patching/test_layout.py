"""Where masked weights are in a file: as transformers reads it, with rows that it reorders, transposes and fuses."""

import gguf
import numpy as np
import pytest
import torch
from gguf_models import logits, make, mask_of, read_gguf, write_gguf

from mft.files.gguf_file import read_gguf_header
from mft.patching.layout import Layout
from mft.patching.outline import gguf_outline
from mft.patching.patch import patch_gguf
from mft.patching.patch_plan import plan_patch


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


def test_a_head_of_its_own_can_be_masked(tmp_path):
    path = write_gguf(make("llama"), tmp_path / "model.gguf")
    _, layout = layout_of(path, {"lm_head": (64, 256)})
    ((tensor, elements),) = layout.elements("lm_head", np.array([5, 300]))
    assert (tensor.name, elements.tolist()) == ("output.weight", [5, 300])


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
