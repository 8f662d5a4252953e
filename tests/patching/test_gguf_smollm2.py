"""SmolLM2-135M's own GGUF file, patched as by a user: in Q4_1, which has no zero, and in the types that have one.

With a patched file, llama.cpp computes what torch computes with the mask on the base. `make llama-test` installs
llama.cpp in its own environment. These tests are skipped if MFT_LLAMA_PYTHON names no Python with xllamacpp.
"""

import hashlib
import json
import os
import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import quants
from gguf_models import read_gguf

from mft.config import MaskConfig, ModelConfig
from mft.masks.convert import mask_model, merge_model
from mft.masks.export import load_masks, save_masks
from mft.models.pretrained import load_model
from mft.models.smollm2 import fetch_smollm2
from mft.patching.lora import write_gguf_lora
from mft.patching.patch import patch_gguf, undo_gguf_patch

PROMPTS = [
    "def read(path):\n    with open(path",
    "The capital of France is",
    "Q: What is 7 + 5?\nA:",
    "import os\n\n\nclass",
    "Once upon a time there was a",
    "Water boils at a temperature of",
]


@pytest.fixture(scope="module")
def source(smollm2_dir):
    return fetch_smollm2()


@pytest.fixture(scope="module")
def masks(source, tmp_path_factory):
    """1 % of the weights of all linear layers, the smallest of the base in bfloat16."""
    model, _ = load_model(ModelConfig("smollm2-135m"))
    mask_model(model, MaskConfig(keep_ratio=0.99, init="normal", seed=3))
    return save_masks(model, tmp_path_factory.mktemp("masks") / "masks")


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [tokenizer(text).input_ids for text in PROMPTS]


def requantized(source, target, kind):
    """Copy the file with its matrices in another type."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            is_array = field.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if is_array else None)
    for tensor in reader.tensors:
        values = quants.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values)
        else:
            writer.add_tensor(tensor.name, quants.quantize(values, Kind[kind]), raw_dtype=Kind[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@torch.no_grad()
def torch_log_probs(model, prompts):
    return torch.stack([model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1) for ids in prompts])


@pytest.mark.slow
def test_the_q4_1_file_is_refused_by_name_and_its_widened_form_is_the_mask_on_the_base(
    source, masks, prompts, tmp_path
):
    with pytest.raises(ValueError, match="got Q4_1 of blk.0.attn_q.weight and 209 more: --widen f32 stores them"):
        patch_gguf(source, masks, tmp_path / "out.gguf")
    patched = patch_gguf(source, masks, tmp_path / "out.gguf", widen="f32")
    assert "is the base of the masks: its weights have their hash" in patched.base
    assert patched.grown == 358_318_080  # 106,168,320 weights with 4 bytes instead of 20 / 32
    expected = torch_log_probs(merge_model(load_masks(read_gguf(source), masks, force=True)), prompts)
    assert torch.equal(torch_log_probs(read_gguf(patched.path), prompts), expected)
    undo_gguf_patch(patched.path, tmp_path / "back.gguf")
    hashes = [hashlib.sha256(path.read_bytes()).digest() for path in (source, tmp_path / "back.gguf")]
    assert hashes[0] == hashes[1]


def llama_log_probs(model, prompts, directory, *adapter):
    python = os.environ.get("MFT_LLAMA_PYTHON")
    if not python:
        pytest.skip("needs MFT_LLAMA_PYTHON, a Python with xllamacpp: make llama-test")
    out = directory / "log_probs.npy"
    command = [python, Path(__file__).with_name("llama_log_probs.py"), model, out, *adapter]
    run = subprocess.run(command, input=json.dumps(prompts), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return torch.from_numpy(np.load(out)).log_softmax(-1)  # its decimals do not add up to 1


def divergence(one, other):
    """Return the KL of other from one, in nats per token."""
    return float((one.exp() * (one - other)).sum(-1).mean())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0", "Q4_1"])
def test_llama_cpp_is_as_near_to_torch_on_a_patched_file_as_on_the_base(kind, source, masks, prompts, tmp_path):
    path = source if kind == "Q4_1" else requantized(source, tmp_path / "model.gguf", kind)
    on_base = llama_log_probs(path, prompts, tmp_path)
    patched = patch_gguf(path, masks, tmp_path / "out.gguf", widen="f32", force=True).path
    base = read_gguf(path)
    base_torch = torch_log_probs(base, prompts)
    masked_torch = torch_log_probs(merge_model(load_masks(base, masks, force=True)), prompts)
    apart = divergence(base_torch, on_base), divergence(masked_torch, llama_log_probs(patched, prompts, tmp_path))
    effect = divergence(masked_torch, base_torch)
    print(f"{kind}: KL {apart[0]:.5f} on the base, {apart[1]:.5f} on the patched file; the mask does {effect:.5f}")
    assert apart[1] < 3 * apart[0] + 1e-3
    assert effect > 10 * apart[1]


@pytest.mark.slow
def test_llama_cpp_with_the_adapter_is_near_to_the_patched_file(source, prompts, tmp_path):
    path = requantized(source, tmp_path / "model.gguf", "F16")
    model = mask_model(read_gguf(path), MaskConfig(keep_ratio=0.9, init="normal", layers_to_transform=[10, 11]))
    masks = save_masks(model, tmp_path / "masks")
    patched = patch_gguf(path, masks, tmp_path / "out.gguf").path
    adapter = write_gguf_lora(path, masks, tmp_path / "adapter.gguf")
    assert adapter.is_exact
    one = llama_log_probs(patched, prompts, tmp_path)
    other = llama_log_probs(path, prompts, tmp_path, adapter.path)
    base = llama_log_probs(path, prompts, tmp_path)
    print(
        f"KL {divergence(one, other):.6f} of the adapter from the patched file, {divergence(one, base):.6f} without it"
    )
    assert divergence(one, other) < divergence(one, base) / 100
