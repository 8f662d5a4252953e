"""The adapter: W + B A is the masked weight, in the file's row order, and it reports where float16 rounds."""

import gguf
import numpy as np
import pytest
from gguf_models import make, mask_of, write_gguf

from mft.patching.lora import adapter_size, write_gguf_lora
from mft.patching.patch import patch_gguf
from mft.patching.patch_plan import plan_patch


def tensors(path):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def values(tensor):
    return gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])


@pytest.mark.parametrize(("kind", "exact"), [("F16", True), ("Q4_1", False), ("Q8_0", False)])
def test_the_weight_with_its_adapter_is_the_masked_weight(kind, exact, tmp_path):
    path = write_gguf(make("llama"), tmp_path / "model.gguf", kind)
    masks, _ = mask_of(path, tmp_path / "masks")
    adapter = write_gguf_lora(path, masks, tmp_path / "adapter.gguf")
    masked = patch_gguf(path, masks, tmp_path / "out.gguf", widen="f32").path
    parts, base, expected = tensors(adapter.path), tensors(path), tensors(masked)
    errors = []
    for name in sorted({part.rpartition(".")[0] for part in parts}):
        a, b = (values(parts[f"{name}.lora_{part}"]) for part in "ab")
        errors.append(np.abs(values(base[name]) + b @ a - values(expected[name])).max())
    assert len(errors) == 14
    assert adapter.is_exact is exact
    assert bool(max(errors) == 0) is exact
    assert max(errors) == pytest.approx(adapter.largest_error)
    assert max(errors) < 1e-3
    assert adapter.dropped == plan_patch(path, masks).count


def test_the_identity_is_on_the_smaller_side_and_the_size_is_known_before(tmp_path):
    path = write_gguf(make("llama", intermediate_size=512), tmp_path / "model.gguf", "F16")
    masks, _ = mask_of(path, tmp_path / "masks", layers_to_transform=[0], target_modules=["k_proj", "down_proj"])
    adapter = write_gguf_lora(path, masks, tmp_path / "adapter.gguf")
    shapes = {name: tuple(tensor.shape[::-1]) for name, tensor in tensors(adapter.path).items()}
    assert shapes == {
        "blk.0.attn_k.weight.lora_a": (128, 256),
        "blk.0.attn_k.weight.lora_b": (128, 128),
        "blk.0.ffn_down.weight.lora_a": (256, 512),
        "blk.0.ffn_down.weight.lora_b": (256, 256),
    }
    size = adapter_size(plan_patch(path, masks))
    assert size == 2 * sum(np.prod(shape) for shape in shapes.values())
    assert size < adapter.bytes < size + 2000


def test_it_is_an_adapter_as_llama_cpp_asks(tmp_path):
    path = write_gguf(make("llama"), tmp_path / "model.gguf", "F16")
    masks, _ = mask_of(path, tmp_path / "masks", target_modules=["q_proj"])
    fields = gguf.GGUFReader(write_gguf_lora(path, masks, tmp_path / "adapter.gguf").path).fields
    keys = ("general.type", "general.architecture", "adapter.type", "adapter.lora.alpha")
    assert [fields[key].contents() for key in keys] == ["adapter", "llama", "lora", 0.0]


def test_experts_are_refused_by_their_tensor(tmp_path):
    path = write_gguf(make("qwen3moe"), tmp_path / "model.gguf", "F16")
    masks, _ = mask_of(path, tmp_path / "masks")
    with pytest.raises(ValueError, match=r"two dimensions, got \(4, 768, 256\) of blk.0.ffn_gate_exps.weight"):
        write_gguf_lora(path, masks, tmp_path / "adapter.gguf")
    assert not (tmp_path / "adapter.gguf").exists()
