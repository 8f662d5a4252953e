"""Masks in GGUF files. The model is a Llama of two blocks; `written(tmp)` is its file, and `masks_in(tmp, patch)` are
masks on the weights that the file decodes to.
"""

import fcntl
import json

import torch
from tiny_gguf import write_tiny_gguf

from mft.cli.patch import Request
from mft.config import MaskConfig, ModelConfig
from mft.files.gguf_file import read_gguf_header
from mft.masks.convert import mask_model
from mft.masks.export import save_masks
from mft.models.pretrained import load_model
from mft.patching.lora import write_gguf_lora
from mft.patching.patch import patch_gguf, patch_gguf_in_place, undo_gguf_patch

DOWN = "model.layers.1.mlp.down_proj"


def written(tmp, **changes):
    write_tiny_gguf(tmp / "model.gguf", **changes)
    return tmp / "model.gguf"


def base_of(path, patch):
    patch.setenv("MFT_CACHE", str(path.parent / "cache"))
    return load_model(ModelConfig(str(path), dtype="float32"))[0]


def masks_in(tmp, patch, change=0.0, **changes):
    """Save masks; ``change`` is added to a weight before the masks are made."""
    model = base_of(written(tmp, **changes), patch)
    with torch.no_grad():
        model.get_submodule(DOWN).weight.mul_(1 - change).add_(change * torch.randn(16, 32).sign())
    mask = MaskConfig(keep_ratio=0.8, target_modules=["down_proj"], layers_to_transform=1)
    return save_masks(mask_model(model, mask), tmp / "masks")


def for_layer(masks, name, shape):
    path = masks / "adapter_config.json"
    config = json.loads(path.read_text())
    config["modules"][0] |= {"name": name, "shape": shape, "kept": 0}
    path.write_text(json.dumps(config))
    return masks


def request(tmp, *rest, **options):
    given = {"undo": False, "in_place": False, "widen": None, "lora": None, "base": None, "dtype": None, "force": False}
    return Request(tmp / "model.gguf", rest, **given | options)


TABLE = r"""
masks of other weights than a GGUF file's
    masks = masks_in(tmp, patch, change=0.01)
    patch_gguf(tmp / "model.gguf", masks, tmp / "out.gguf")
    -> ValueError: model.gguf | must hold the weights that the masks in | got sha256:
        | name that file; if it is a quantisation of that model, give the model to compare it with (load_base)
masks of another model than a GGUF file's
    masks = masks_in(tmp, patch, change=1.0)
    base = base_of(tmp / "model.gguf", patch)
    torch.manual_seed(0)
    base.get_submodule(DOWN).weight.data.normal_()
    patch_gguf(tmp / "model.gguf", masks, tmp / "out.gguf", load_base=lambda: base)
    -> ValueError: model.gguf | must be a quantisation of the model that the masks in
        | whose correlation with its weights is ...: | name the file of that model, or take it as it is (force, --force)
masks for a layer that a GGUF file lacks
    masks = for_layer(masks_in(tmp, patch), "model.layers.2.mlp.down_proj", [16, 32])
    patch_gguf(tmp / "model.gguf", masks, tmp / "out.gguf")
    -> ValueError: model.gguf | masks must be for layers of this model | got one for 'model.layers.2.mlp.down_proj'
        | name the GGUF file of the model that they were learned on
masks of another shape than a GGUF file's
    masks = for_layer(masks_in(tmp, patch), DOWN, [16, 64])
    patch_gguf(tmp / "model.gguf", masks, tmp / "out.gguf")
    -> ValueError: model.layers.1.mlp.down_proj | must have a weight of (16, 64), as its mask | got (16, 32)
        | name the GGUF file of the model that the masks were learned on
a mask on the head of a GGUF file without one
    masks = for_layer(masks_in(tmp, patch), "lm_head", [41, 16])
    patch_gguf(tmp / "model.gguf", masks, tmp / "out.gguf")
    -> ValueError: lm_head | must have a tensor of its own to be masked | got one that shares token_embd.weight
        | leave it out of the masks
a scale that is infinite
    masks = masks_in(tmp, patch, down="Q8_0")
    content = bytearray((tmp / "model.gguf").read_bytes())
    start = read_gguf_header(tmp / "model.gguf").tensors["blk.1.ffn_down.weight"].start
    content[start : start + 16 * 34] = (b"\x00\x7c" + bytes(32)) * 16
    (tmp / "model.gguf").write_bytes(content)
    patch_gguf(tmp / "model.gguf", masks, tmp / "out.gguf", force=True)
    -> ValueError: blk.1.ffn_down.weight | must have finite scales where weights are dropped
        | got a scale in block ... that is infinite or NaN | quantise the model again
a width other than f32
    patch_gguf(tmp / "model.gguf", masks_in(tmp, patch), tmp / "out.gguf", widen="f16")
    -> ValueError: widen | must be f32 (or not be given) | got 'f16'
a GGUF file that is not there
    patch_gguf(tmp / "modle.gguf", masks_in(tmp, patch), tmp / "out.gguf")
    -> FileNotFoundError: modle.gguf | must be a GGUF file that exists | got nothing there | did you mean
the undo of a file that was not patched
    undo_gguf_patch(written(tmp), tmp / "back.gguf")
    -> FileNotFoundError: model.gguf.undo | the undo file that mft patch writes must lie next to | got nothing there
        | move it there
mft patch without an output
    request(tmp, "runs/masks")
    -> ValueError: arguments | must be MODEL MASKS OUTPUT with these options | model.gguf runs/masks
mft patch --in-place with --widen
    request(tmp, "runs/masks", in_place=True, widen="f32")
    -> ValueError: --widen | must not come with --in-place | f32 | wider tensors do not fit
mft patch --undo with --widen
    request(tmp, "back.gguf", undo=True, widen="f32")
    -> ValueError: --widen | must not come with --undo | got f32

masks that drop nothing
    masks = save_masks(mask_model(base_of(written(tmp), patch), MaskConfig(keep_ratio=1.0)), tmp / "all")
    patched = patch_gguf(tmp / "model.gguf", masks, tmp / "out.gguf")
    assert (tmp / "out.gguf").read_bytes() == (tmp / "model.gguf").read_bytes()
    -> accepted: the patched file is equal to the model
"""
