"""Files that are read and written: masks, checkpoints, the paper's `masks.pt`, models, configurations. The model is a
random Llama of four layers, `masks_in(tmp)` an export of masks on its layers 2 and 3, `checkpoint_in(tmp)` a
checkpoint. `edit(path, ...)` changes keys of a JSON file and returns its directory, `write(path, text)` returns the
path.
"""

import json
import os
import re
import struct

import torch
from safetensors.torch import load_file, save_file
from tiny import make_llama, masked_llama
from torch import nn

from mft.cli.verify import verify_directory
from mft.config import MaskConfig, ModelConfig, RunConfig, parse_layers
from mft.config_file import load_config
from mft.masks.convert import mask_model, masked_modules, merge_model
from mft.masks.export import load_masks, recode_masks, save_masks
from mft.masks.paper_masks import read_paper_masks
from mft.masks.peft import MaskPeftConfig
from mft.memory.model_config import read_model_config
from mft.memory.shapes import known_config, shape_from_config
from mft.models.pretrained import load_model, save_model
from mft.training.checkpoint import BadCheckpoint, newest_checkpoint, verify_checkpoint, write_checkpoint
from mft.training.run_directory import check_run_directory

from .experts import under_peft

CONFIG, MASKS = "adapter_config.json", "adapter_model.safetensors"
UP = "model.layers.2.mlp.up_proj"


def other_base():
    model = make_llama()
    with torch.no_grad():
        model.get_submodule(UP).weight[0, 0] += 1
    return model


def masks_in(tmp):
    return save_masks(masked_llama(), tmp / "masks", base_model_name_or_path="base", coding="packed")


def checkpoint_in(tmp, step=3):
    return write_checkpoint(tmp, step, {"scores": torch.arange(40.0)}, {"seed": 0}).path


def edit(path, **changes):
    """Change keys of a JSON file; return its directory."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path.parent


def write(path, text):
    path.write_text(text)
    return path


class Runs:
    """A pickle can call a function when it is read."""

    def __reduce__(self):
        return print, ("run",)


TABLE = r"""
# bases of masks
masks of another base
    load_masks(other_base(), masks_in(tmp))
    -> ValueError: masks | expected base sha256: | the model's is sha256:
        | To use the masks on this model anyway, pass force=True (--force)
masks of the base in another dtype
    load_masks(make_llama(torch.bfloat16), masks_in(tmp))
    -> ValueError: masks | those were float32 | The model's weights are bfloat16 | load it in that dtype
masks of a smaller base
    model = make_llama()
    model.model.layers[2].self_attn.q_proj = nn.Linear(48, 48)
    load_masks(model, masks_in(tmp), force=True)
    -> ValueError: layers.2 | the mask is for a weight of (32, 32) | the model's is (48, 48)
        | load the base that it was learned on
masks on a model that is masked elsewhere
    load_masks(masked_llama(layers=(1, 2)), masks_in(tmp))
    -> ValueError: model | must be masked in the 14 layers of the export, or in none
        | only in the model: ['model.layers.1.
a revision of a model on this machine
    load_model(ModelConfig(name=str(tmp), revision="v2.0"))
    -> ValueError: model.revision | must be null for a model on this machine | 'v2.0' | leave it out, or name a hub id
a revision that is not in the cache
    patch.setattr("mft.models.pretrained.hub_is_reachable", lambda: False)
    load_model(ModelConfig(name="someone/some-model", revision="v2.0"))
    -> ValueError: at model.revision 'v2.0' | nor a model in the hub's local cache | 'someone/some-model'
        | check the name and the network, or give a local directory
a mask on tied weights
    model = make_llama()
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    mask_model(model, MaskConfig())
    -> ValueError: model.layers.0.mlp.up_proj | cannot mask | its weight is tied to model.layers.2.mlp.up_proj.weight
        | Untie it first (module.weight = nn.Parameter(module.weight.clone())), or leave it out with exclude_modules
a mask on a layer that is misspelt
    mask_model(make_llama(), MaskConfig(target_modules=["q_porj"]))
    -> ValueError: target_modules | linear layers here: | 'q_porj' | did you mean q_proj?
a mask on a layer that is not there
    mask_model(make_llama(), MaskConfig(layers_to_transform=4))
    -> ValueError: layers_to_transform | must lie in 0 to 3 | got 4
a module to save where scores alone are trained
    RunConfig(mask=MaskConfig(modules_to_save=["lm_head"]), memory="layerwise")
    -> ValueError: memory | be plain (or auto) with mask.modules_to_save | layerwise
        | because the other ways train only scores
a model masked twice
    mask_model(mask_model(make_llama(), MaskConfig()), MaskConfig())
    -> ValueError: model | must not be masked already | 28 masked layers
        | merge_model(model) first to learn a further mask on top, or start from a fresh model
a mask on a wrapped model
    mask_model(nn.DataParallel(make_llama()), MaskConfig())
    -> ValueError: model | must be the plain model | one wrapped in DataParallel
        | mask it before torch.compile and distribution

# exports
masks that are not there
    load_masks(make_llama(), tmp / "nowhere")
    -> FileNotFoundError: nowhere | expected a directory with adapter_config.json | nothing there
an export cut off
    os.truncate(masks_in(tmp) / MASKS, 1000)
    load_masks(make_llama(), tmp / "masks")
    -> ValueError: adapter_model.safetensors | expected a safetensors file
        | got 1000 bytes that are damaged or cut off (...): | copy the export again
a small coded export that says that it is large
    # read as it says, it would ask for 9 GB
    path = recode_masks(masks_in(tmp), tmp / "coded") / CONFIG
    modules = json.loads(path.read_text())["modules"]
    large = [m | {"shape": [2**18, 2**18], "kept": 0} if m["name"] == UP else m for m in modules]
    recode_masks(edit(path, modules=large), tmp / "again")
    -> ValueError: model.layers.2.mlp.up_proj.mask | stream must have 8388608 to | got 127 | copy the export again
masks saved in an unknown coding
    save_masks(masked_llama(), tmp / "masks", coding="rise")
    -> ValueError: coding | must be one of packed, rice, by_weight | got 'rise' | did you mean rice?
masks coded by weight, and no weights
    save_masks(masked_llama(), tmp / "masks", base_model_name_or_path="base", coding="by_weight")
    recode_masks(tmp / "masks", tmp / "again")
    -> ValueError: masks | in coding by_weight can only be read with the weights of their base, base | got none
        | mft recode
an export of a newer format
    load_masks(make_llama(), edit(masks_in(tmp) / CONFIG, format_version=5))
    -> ValueError: adapter_config.json | expected format_version 4 | got 5 | upgrade mft
an adapter of another kind
    load_masks(make_llama(), edit(masks_in(tmp) / CONFIG, peft_type="LORA"))
    -> ValueError: adapter_config.json | expected peft_type 'MFT' | got 'LORA' | load it with peft
masks of a model without any
    save_masks(make_llama(), tmp / "masks")
    -> ValueError: model | no masked layers to save | a plain LlamaForCausalLM | mask_model it
masks under PEFT saved as an export
    save_masks(under_peft(make_llama(), MaskPeftConfig(target_modules=["up_proj"])), tmp / "masks")
    -> ValueError: model | must have masked layers of mask_model to save | got a PeftModel with masks under PEFT
        | save mft.to_masked_model(model), which takes this model apart; model.save_pretrained keeps the scores
masks under PEFT merged as masked layers
    merge_model(under_peft(make_llama(), MaskPeftConfig(target_modules=["up_proj"])))
    -> ValueError: model | must have masked layers of mask_model to merge | got a PeftModel with masks under PEFT
        | call model.merge_and_unload()
a masked model saved as an ordinary one
    save_model(masked_llama(), None, tmp / "model")
    -> ValueError: model | must be merged before it is saved | got 14 masked layers such as model.layers.2.
        | call merge_model(model) first
a merge of a model without masks
    merge_model(make_llama())
    -> ValueError: model | has no masked layers to merge | a plain LlamaForCausalLM | mask_model or load_masks first
masks merged by nothing
    merge_model(masked_llama(), alpha=0)
    -> ValueError: alpha | must lie in (0, 1] | got 0 | 1 applies the mask in full
masks merged by alpha beside a module that was trained whole
    merge_model(masked_llama(modules_to_save=["model.norm"]), alpha=0.8)
    -> ValueError: alpha | must be 1 with modules_to_save | got 0.8 with model.norm | leave alpha out
a directory with nothing to verify
    verify_directory(tmp)
    -> FileNotFoundError: masks/ or in checkpoints/ | expected adapter_config.json or manifest.json | got neither

# the paper's masks.pt
a masks pt that is not there
    read_paper_masks(tmp / "masks.pt")
    -> FileNotFoundError: masks.pt | expected the masks.pt of the paper's code | nothing there
a masks pt with a list
    torch.save([torch.ones(4, 5)], tmp / "masks.pt")
    read_paper_masks(tmp / "masks.pt")
    -> ValueError: masks.pt | expected a dictionary of masks | got list of 1 entries
a masks pt with shares in place of a mask
    torch.save({"up_proj": torch.full((4, 5), 0.5)}, tmp / "masks.pt")
    read_paper_masks(tmp / "masks.pt")
    -> ValueError: up_proj | must hold ones and zeros | got 20 other values, 0.5 among them
a masks pt of a kilobyte that asks for 17 gigabytes
    torch.save({"up_proj": torch.ones(1).expand(65536, 65536)}, tmp / "masks.pt")
    read_paper_masks(tmp / "masks.pt")
    -> ValueError: masks.pt | expected every value of every mask in the file | got ... bytes for masks of 17179869184
        | save contiguous tensors (mask.contiguous())
a masks pt of tensors without values
    torch.save({"up_proj": torch.empty(4, 5, device="meta")}, tmp / "masks.pt")
    read_paper_masks(tmp / "masks.pt")
    -> ValueError: masks.pt | which no dictionary of dense masks needs
        | got a file with: 'torch._utils._rebuild_meta_tensor_no_storage'
a masks pt that would run code
    torch.save({"up_proj": Runs()}, tmp / "masks.pt")
    read_paper_masks(tmp / "masks.pt")
    -> ValueError: masks.pt | expected a dictionary of tensors saved by torch | got a file with: '__builtin__.print'

# checkpoints
a checkpoint with another byte
    path = checkpoint_in(tmp) / "state.json"
    path.write_text(path.read_text().replace("0", "1"))
    verify_checkpoint(tmp / "step-00000003")
    -> BadCheckpoint: state.json | expected sha256 | , got | restore what was written, or delete the checkpoint
a checkpoint of a newer format
    verify_checkpoint(edit(checkpoint_in(tmp) / "manifest.json", format_version=2))
    -> BadCheckpoint: manifest.json | expected format_version 1 | got 2 | upgrade mft

# models
a model directory that is misspelt
    (tmp / "model").mkdir()
    load_model(str(tmp / "modle"))
    -> ValueError: model.name | must be a model that exists | modle' | did you mean /tmp/dir/model?
a model directory without a config
    load_model(str(tmp))
    -> ValueError: model.name | must be a directory with a config.json | without one
        | name a directory that save_pretrained wrote
a run of masks where a model is due
    load_model(str(masks_in(tmp).parent))
    -> ValueError: model.name | must be a model | which holds masks or an adapter
        | or write a merged model by mft merge /tmp/dir DIRECTORY
a run of mft finetune where its model is due
    make_llama().save_pretrained(tmp / "model")
    load_model(str(tmp))
    -> ValueError: model.name | must be a directory with a config.json | without one | name /tmp/dir/model
a model config that is no json
    read_model_config(str(write(tmp / "config.json", "hidden_size: 64")))
    -> ValueError: config.json:1 | expected JSON | got a file with: Expecting value
a mixture to be estimated with dense layers
    shape_from_config(known_config("qwen3-30b-a3b") | {"mlp_only_layers": [0]}, "mine")
    -> ValueError: mine has | model must have experts in every layer | mlp_only_layers=[0]

# configurations
a configuration in the words of the papers code
    load_config(write(tmp / "run.yaml", "mask: {sparsity: 0.9}"))
    -> ValueError: run.yaml | unknown key | 'mask.sparsity' | did you mean mask.keep_ratio?
a configuration with a key twice
    load_config(write(tmp / "run.yaml", "train:\n  lr: 1\n  lr: 2\n"))
    -> ValueError: run.yaml:3:3 | the key 'lr' stands twice, first in line 2 | 'lr' | leave one out
a best step that no evaluation finds
    load_config(None, ["train.keep_best=true"])
    -> ValueError: train.keep_best | must be false unless eval_every or eval_minutes says when to evaluate | got True
an evaluation every so many steps and minutes
    load_config(None, ["train.eval_every=100", "train.eval_minutes=5"])
    -> ValueError: train.eval_minutes | must be null with eval_every = 100 | got 5.0
a tracker that is misspelt
    load_config(None, ["report_to=tensorbord"])
    -> ValueError: report_to | must be one of tensorboard, trackio, mlflow, wandb | got ['tensorbord']
        | did you mean tensorboard?
an override in the words of transformers
    load_config(None, ["train.load_best_model_at_end=true"])
    -> ValueError: override | unknown key | 'train.load_best_model_at_end' | did you mean train.keep_best?
a configuration in another encoding
    (tmp / "run.yaml").write_bytes(b"\xff\xfe\x00")
    load_config(tmp / "run.yaml")
    -> ValueError: run.yaml | config must be UTF-8 text | byte 0 is not
a configuration that is misspelt
    write(tmp / "run.yaml", "output_dir: a")
    load_config(tmp / "rnu.yaml")
    -> ValueError: config | must be a YAML file that exists | rnu.yaml | did you mean /tmp/dir/run.yaml?
an override without a value
    load_config(None, ["train.lr"])
    -> ValueError: override | must look like train.lr=3e-4 | 'train.lr'
a falling range of layers
    parse_layers("3-1")
    -> ValueError: layers_to_transform | must have ranges that rise | '3-1'
a run in a directory of something else
    write(tmp / "notes.txt", "mine")
    check_run_directory(tmp, overwrite=True)
    -> ValueError: output_dir | must be new, empty or a run's | with notes.txt | name another one

# accepted
masks of another base with force
    saved = masked_modules(masked_llama())
    loaded = masked_modules(load_masks(other_base(), masks_in(tmp), force=True))
    assert all(torch.equal(loaded[name].mask(), saved[name].mask()) for name in saved)
    -> accepted: its masks are used, exactly as stored
masks saved over earlier ones
    masks_in(tmp)
    save_masks(masked_llama(keep_ratio=0.5), tmp / "masks")
    assert json.loads((tmp / "masks" / CONFIG).read_text())["keep_ratio"] == 0.5
    assert sorted(os.listdir(tmp)) == ["masks"]
    -> accepted: they are replaced, as a whole: at no moment does half an export lie there
a head tied to the embedding
    model = mask_model(make_llama(tie_word_embeddings=True), MaskConfig(target_modules="all-linear"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head" not in masked_modules(model)
    -> accepted: the head and the embedding stay tied, and are not masked
numbers in a configuration
    config = load_config(write(tmp / "run.yaml", "train: {lr: 3e-4, steps: 1e2}"))
    assert (config.train.lr, config.train.steps) == (3e-4, 100)
    -> accepted: numbers: 3e-4, which YAML 1.1 takes for text, and 1e2 for a count
"""
