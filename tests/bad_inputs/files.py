"""What is read and written: masks, checkpoints, the paper's `masks.pt`, models, configurations. The model is a random
Llama of four layers, `masks_in(tmp)` an export of masks on its layers 2 and 3.
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
from mft.memory.model_config import read_model_config
from mft.memory.shapes import known_config, shape_from_config
from mft.models.pretrained import load_model, save_model
from mft.training.checkpoint import BadCheckpoint, newest_checkpoint, verify_checkpoint, write_checkpoint
from mft.training.run_directory import check_run_directory

from .registry import accepted, refused

CONFIG, MASKS = "adapter_config.json", "adapter_model.safetensors"
UP = "model.layers.2.mlp.up_proj"
RESTORE = "restore what was written, or delete the checkpoint"
HASH = r"(?<=sha256:)[0-9a-f]{64}"


def masks_in(tmp):
    return save_masks(masked_llama(), tmp / "masks", base_model_name_or_path="base", coding="packed")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write(path, text):
    path.write_text(text)
    return path


def checkpoint_in(tmp, step=3):
    return write_checkpoint(tmp, step, {"scores": torch.arange(40.0)}, {"seed": 0}).path


# ---------------------------------------------------------------------------------------------- bases of masks


@refused(
    ValueError,
    where="masks",
    got="the model's is sha256:",
    rule="expected base sha256:",
    remedy="To use the masks on this model all the same, pass force=True to load_masks (--force)",
    other=HASH,
)
def masks_of_another_base(tmp):
    other = make_llama()
    with torch.no_grad():
        other.get_submodule(UP).weight[0, 0] += 1
    load_masks(other, masks_in(tmp))


@refused(
    ValueError,
    where="masks",
    got="The model's weights are bfloat16",
    rule="those were float32",
    remedy="load it in that dtype",
    other=HASH,
)
def masks_of_the_base_in_another_dtype(tmp):
    load_masks(make_llama(torch.bfloat16), masks_in(tmp))


@refused(
    ValueError,
    where="layers.2",
    got="the model's is (48, 48)",
    rule="the mask is for a weight of (32, 32)",
    remedy="load the base that it was learned on",
)
def masks_of_a_smaller_base(tmp):
    model = make_llama()
    model.model.layers[2].self_attn.q_proj = nn.Linear(48, 48)
    load_masks(model, masks_in(tmp), force=True)


@refused(
    ValueError,
    where="model",
    got="only in the model: ['model.layers.1.",
    rule="must be masked in the 14 layers of the export, or in none",
)
def masks_on_a_model_that_is_masked_elsewhere(tmp):
    load_masks(masked_llama(layers=(1, 2)), masks_in(tmp))


@refused(
    ValueError,
    where="model.revision",
    got="'v2.0'",
    rule="must be null for a model on this machine",
    remedy="leave it out, or name a hub id",
)
def a_revision_of_a_model_on_this_machine(tmp):
    load_model(ModelConfig(name=str(tmp), revision="v2.0"))


@refused(
    ValueError,
    where="at model.revision 'v2.0'",
    got="'someone/some-model'",
    rule="nor a model in the hub's local cache",
    remedy="check the name and the network, or give a local directory",
)
def a_revision_that_is_not_in_the_cache(patch):
    patch.setattr("mft.models.pretrained.hub_is_reachable", lambda: False)
    load_model(ModelConfig(name="someone/some-model", revision="v2.0"))


@refused(
    ValueError,
    where="model.layers.0.mlp.up_proj",
    got="its weight is tied to model.layers.2.mlp.up_proj.weight",
    rule="cannot mask",
    remedy="Untie it first (module.weight = nn.Parameter(module.weight.clone())), or leave it out with exclude_modules",
)
def a_mask_on_tied_weights():
    model = make_llama()
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    mask_model(model, MaskConfig())


@refused(
    ValueError,
    where="target_modules",
    got="the output embedding lm_head",
    rule="never masked",
    remedy="masks are for attention and MLP",
)
def a_mask_on_the_head():
    mask_model(make_llama(), MaskConfig(target_modules=["lm_head"]))


@refused(ValueError, where="target_modules", got="'q_porj'", rule="linear layers here:", remedy="did you mean q_proj?")
def a_mask_on_a_layer_that_is_misspelt():
    mask_model(make_llama(), MaskConfig(target_modules=["q_porj"]))


@refused(ValueError, where="layers_to_transform", got="got 4", rule="must lie in 0 to 3")
def a_mask_on_a_layer_that_is_not_there():
    mask_model(make_llama(), MaskConfig(layers_to_transform=4))


@refused(
    ValueError,
    where="modules_to_save",
    got="'lm_haed'",
    rule="it takes the ends of modules' names",
    remedy="did you mean lm_head?",
)
def a_module_to_save_that_is_misspelt():
    mask_model(make_llama(), MaskConfig(modules_to_save=["lm_haed"]))


@refused(
    ValueError,
    where="memory",
    got="layerwise",
    rule="be plain (or auto) with mask.modules_to_save",
    remedy="as the other ways train scores alone",
)
def a_module_to_save_where_scores_alone_are_trained():
    RunConfig(mask=MaskConfig(modules_to_save=["lm_head"]), memory="layerwise")


@refused(
    ValueError,
    where="model.layers.1.mlp.up_proj",
    got="of torch.int8",
    rule="masks need fp32, fp16 or bf16 weights",
    remedy="Choose other target_modules, or leave such modules as they are with exclude_modules=['up_proj']",
)
def a_mask_on_a_weight_of_integers():
    model = make_llama()
    integers = nn.Parameter(torch.zeros(64, 32, dtype=torch.int8), requires_grad=False)
    model.model.layers[1].mlp.up_proj.weight = integers
    mask_model(model, MaskConfig())


@refused(
    ValueError,
    where="model",
    got="28 masked layers",
    rule="must not be masked already",
    remedy="merge_model(model) first to learn a further mask on top, or start from a fresh model",
)
def a_model_masked_twice():
    mask_model(mask_model(make_llama(), MaskConfig()), MaskConfig())


@refused(
    ValueError,
    where="model",
    got="one wrapped in DataParallel",
    rule="must be the plain model",
    remedy="mask it before torch.compile and distribution",
)
def a_mask_on_a_wrapped_model():
    mask_model(nn.DataParallel(make_llama()), MaskConfig())


# ---------------------------------------------------------------------------------------------- exports


@refused(FileNotFoundError, where="nowhere", got="nothing there", rule="expected a directory with adapter_config.json")
def masks_that_are_not_there(tmp):
    load_masks(make_llama(), tmp / "nowhere")


@refused(FileNotFoundError, where=MASKS, got="missing", rule=f"an export has {CONFIG} and {MASKS}", remedy="copy both")
def an_export_without_its_masks(tmp):
    (masks_in(tmp) / MASKS).unlink()
    load_masks(make_llama(), tmp / "masks")


@refused(
    ValueError,
    where=MASKS,
    got="got 1000 bytes that are damaged or cut off",
    rule="expected a safetensors file",
    remedy="copy the export again",
    other=r"(?<=cut off \().*(?=\):)",
)
def an_export_cut_off(tmp):
    os.truncate(masks_in(tmp) / MASKS, 1000)
    load_masks(make_llama(), tmp / "masks")


@refused(
    ValueError, where=MASKS, got="got 2047", rule=f"must keep 1844 weights as {CONFIG} says", remedy="copy both again"
)
def an_export_with_a_flipped_bit(tmp):
    path = masks_in(tmp) / MASKS
    tensors = load_file(path)
    tensors[f"{UP}.mask"].fill_(-1)[0, 0] = -2
    save_file(tensors, path)
    load_masks(make_llama(), tmp / "masks")


@refused(
    ValueError,
    where=MASKS,
    got="got an end before word 0",
    rule="stream must have a block for each 131072 words",
    remedy="copy the export again",
)
def a_coded_export_whose_masks_are_cut_off(tmp):
    path = recode_masks(masks_in(tmp), tmp / "coded") / MASKS
    tensors = load_file(path)
    tensors[f"{UP}.mask"] = tensors[f"{UP}.mask"][:4].clone()
    save_file(tensors, path)
    load_masks(make_llama(), tmp / "coded")


@refused(
    ValueError,
    where=f"{UP}.mask",
    got="got 127",
    rule="stream must have 8388608 to",
    remedy="copy the export again",
)
def a_small_coded_export_that_says_that_it_is_large(tmp):
    # read as it says, it would ask for 9 GB
    path = recode_masks(masks_in(tmp), tmp / "coded")
    modules = json.loads((path / CONFIG).read_text())["modules"]
    edit(path / CONFIG, modules=[m | {"shape": [2**18, 2**18], "kept": 0} if m["name"] == UP else m for m in modules])
    load_masks(make_llama(), path)


@refused(ValueError, where="coding", got="got 'rise'", rule="must be one of packed, rice", remedy="did you mean rice?")
def masks_saved_in_an_unknown_coding(tmp):
    save_masks(masked_llama(), tmp / "masks", coding="rise")


@refused(
    ValueError,
    where=CONFIG,
    got="got sha256:",
    rule="expected content_hash sha256:",
    remedy="copy the export again",
    other=HASH,
)
def an_export_changed_by_hand(tmp):
    edit(masks_in(tmp) / CONFIG, keep_ratio=0.8)
    load_masks(make_llama(), tmp / "masks")


@refused(ValueError, where=CONFIG, got="'keep_raito'", rule="unknown key", remedy="did you mean keep_ratio?")
def an_export_with_an_unknown_key(tmp):
    edit(masks_in(tmp) / CONFIG, keep_raito=0.5)
    load_masks(make_llama(), tmp / "masks")


@refused(ValueError, where=CONFIG, got="got 4", rule="expected format_version 3", remedy="upgrade mft")
def an_export_of_a_newer_format(tmp):
    edit(masks_in(tmp) / CONFIG, format_version=4)
    load_masks(make_llama(), tmp / "masks")


@refused(ValueError, where=CONFIG, got="the key 'mode' twice", rule="expected JSON", remedy="leave one out")
def an_export_with_a_key_twice(tmp):
    path = masks_in(tmp) / CONFIG
    path.write_text(path.read_text().replace("{", '{"mode": "value",', 1))
    load_masks(make_llama(), tmp / "masks")


@refused(ValueError, where=CONFIG, got="got ''", rule='base_hash must be a string "sha256:" and 64 hexadecimal digits')
def an_export_of_no_base(tmp):
    edit(masks_in(tmp) / CONFIG, base_hash="")
    load_masks(make_llama(), tmp / "masks")


@refused(ValueError, where=CONFIG, got="got a pipe", rule="expected a regular file", remedy="put the file itself there")
def an_export_that_is_a_pipe(tmp):
    (masks_in(tmp) / CONFIG).unlink()
    os.mkfifo(tmp / "masks" / CONFIG)
    load_masks(make_llama(), tmp / "masks")


@refused(ValueError, where=CONFIG, got="got 'LORA'", rule="expected peft_type 'MFT'", remedy="load it with peft")
def an_adapter_of_another_kind(tmp):
    edit(masks_in(tmp) / CONFIG, peft_type="LORA")
    load_masks(make_llama(), tmp / "masks")


@refused(
    ValueError,
    where="directory",
    got="which holds notes.txt",
    rule="must be new, empty or an earlier export of masks",
    remedy="choose another one",
)
def masks_saved_over_something_else(tmp):
    write(tmp / "notes.txt", "mine")
    save_masks(masked_llama(), tmp)


@refused(
    ValueError, where="model", got="a plain LlamaForCausalLM", rule="no masked layers to save", remedy="mask_model it"
)
def masks_of_a_model_without_any(tmp):
    save_masks(make_llama(), tmp / "masks")


@refused(
    ValueError,
    where="model",
    got="got 14 masked layers such as model.layers.2.",
    rule="must be merged before it is saved",
    remedy="call merge_model(model) first",
)
def a_masked_model_saved_as_an_ordinary_one(tmp):
    save_model(masked_llama(), None, tmp / "model")


@refused(
    ValueError,
    where="model",
    got="a plain LlamaForCausalLM",
    rule="has no masked layers to merge",
    remedy="mask_model or load_masks first",
)
def a_merge_of_a_model_without_masks():
    merge_model(make_llama())


@refused(ValueError, where="alpha", got="got 0", rule="must lie in (0, 1]", remedy="1 bakes it in whole")
def masks_merged_by_nothing():
    merge_model(masked_llama(), alpha=0)


@refused(ValueError, where="alpha", got="got 1.5", rule="must lie in (0, 1]", remedy="1 bakes it in whole")
def masks_merged_by_more_than_all_of_them():
    merge_model(masked_llama(), alpha=1.5)


@refused(
    ValueError,
    where="alpha",
    got="got 0.8 with model.norm",
    rule="must be 1 with modules_to_save",
    remedy="leave alpha out",
)
def masks_merged_by_alpha_beside_a_module_that_was_trained_whole():
    merge_model(masked_llama(modules_to_save=["model.norm"]), alpha=0.8)


@refused(
    FileNotFoundError,
    where="masks/ or in checkpoints/",
    got="got neither",
    rule="expected adapter_config.json or manifest.json",
)
def a_directory_with_nothing_to_verify(tmp):
    verify_directory(tmp)


# ---------------------------------------------------------------------------------------------- the paper's masks.pt


@refused(FileNotFoundError, where="masks.pt", got="nothing there", rule="expected the masks.pt of the paper's code")
def a_masks_pt_that_is_not_there(tmp):
    read_paper_masks(tmp / "masks.pt")


@refused(ValueError, where="masks.pt", got="got list of 1 entries", rule="expected a dictionary of masks")
def a_masks_pt_with_a_list(tmp):
    torch.save([torch.ones(4, 5)], tmp / "masks.pt")
    read_paper_masks(tmp / "masks.pt")


@refused(ValueError, where="up_proj", got="got 20 other values, 0.5 among them", rule="must hold ones and zeros")
def a_masks_pt_with_shares_in_place_of_a_mask(tmp):
    torch.save({"up_proj": torch.full((4, 5), 0.5)}, tmp / "masks.pt")
    read_paper_masks(tmp / "masks.pt")


@refused(
    ValueError,
    where="masks.pt",
    got="bytes for masks of 17179869184",
    rule="expected every value of every mask in the file",
    remedy="save contiguous tensors (mask.contiguous())",
    other=r"(?<=got )\d+(?= bytes)",
)
def a_masks_pt_of_a_kilobyte_that_asks_for_17_gigabytes(tmp):
    torch.save({"up_proj": torch.ones(1).expand(65536, 65536)}, tmp / "masks.pt")
    read_paper_masks(tmp / "masks.pt")


@refused(
    ValueError,
    where="masks.pt",
    got="got a file with: 'torch._utils._rebuild_meta_tensor_no_storage'",
    rule="which no dictionary of dense masks needs",
)
def a_masks_pt_of_tensors_without_values(tmp):
    torch.save({"up_proj": torch.empty(4, 5, device="meta")}, tmp / "masks.pt")
    read_paper_masks(tmp / "masks.pt")


class Runs:
    """What a pickle may make: a call."""

    def __reduce__(self):
        return print, ("run",)


@refused(
    ValueError,
    where="masks.pt",
    got="got a file with: '__builtin__.print'",
    rule="expected a dictionary of tensors saved by torch",
)
def a_masks_pt_that_would_run_code(tmp):
    torch.save({"up_proj": Runs()}, tmp / "masks.pt")
    read_paper_masks(tmp / "masks.pt")


# ---------------------------------------------------------------------------------------------- checkpoints


@refused(BadCheckpoint, where="state.safetensors", got="got 100", rule="expected bytes 232", remedy=RESTORE)
def a_checkpoint_cut_off(tmp):
    os.truncate(checkpoint_in(tmp) / "state.safetensors", 100)
    verify_checkpoint(tmp / "step-00000003")


@refused(BadCheckpoint, where="state.json", got="got ", rule="expected sha256 ", remedy=RESTORE, other=r"[0-9a-f]{64}")
def a_checkpoint_with_another_byte(tmp):
    path = checkpoint_in(tmp) / "state.json"
    path.write_text(path.read_text().replace("0", "1"))
    verify_checkpoint(tmp / "step-00000003")


@refused(BadCheckpoint, where="manifest.json", got="got 2", rule="expected format_version 1", remedy="upgrade mft")
def a_checkpoint_of_a_newer_format(tmp):
    edit(checkpoint_in(tmp) / "manifest.json", format_version=2)
    verify_checkpoint(tmp / "step-00000003")


@refused(
    BadCheckpoint,
    where="manifest.json",
    got="got None",
    rule="expected files ['state.json', 'state.safetensors']",
    remedy=RESTORE,
)
def a_checkpoint_whose_manifest_names_no_files(tmp):
    edit(checkpoint_in(tmp) / "manifest.json", files=None)
    verify_checkpoint(tmp / "step-00000003")


@refused(
    BadCheckpoint,
    where="step-00000003",
    got="'notes.txt'",
    rule="expected files ['manifest.json', 'state.json'",
    remedy=RESTORE,
)
def a_checkpoint_with_a_foreign_file(tmp):
    write(checkpoint_in(tmp) / "notes.txt", "mine")
    verify_checkpoint(tmp / "step-00000003")


# ---------------------------------------------------------------------------------------------- models


@refused(
    ValueError,
    where="model.name",
    got="modle'",
    rule="must be a model that exists",
    remedy="did you mean /tmp/dir/model?",
)
def a_model_directory_that_is_misspelt(tmp):
    (tmp / "model").mkdir()
    load_model(str(tmp / "modle"))


@refused(
    ValueError,
    where="model.name",
    got="without one",
    rule="must be a directory with a config.json",
    remedy="name a directory that save_pretrained wrote",
)
def a_model_directory_without_a_config(tmp):
    load_model(str(tmp))


@refused(
    ValueError,
    where="model.name",
    got="which holds an adapter or a mask",
    rule="must be a model",
    remedy="name its base model, or merge the mask first",
)
def masks_where_a_model_is_due(tmp):
    load_model(str(masks_in(tmp)))


@refused(
    ValueError,
    where="model.name",
    got="which begins with b'PK",
    rule="must be a GGUF file if it is a file",
    remedy="name the directory of an ordinary model",
)
def a_pickled_model(tmp):
    torch.save({}, tmp / "model.bin")
    load_model(str(tmp / "model.bin"))


@refused(
    ValueError,
    where="model.gguf",
    got="1099511627776 bytes claimed at byte 32, where 16 are left",
    rule="expected a GGUF file",
    remedy="copy it again",
)
def a_gguf_cut_off(tmp):
    (tmp / "model.gguf").write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 1, 1) + struct.pack("<Q", 1 << 40) + bytes(16))
    load_model(str(tmp / "model.gguf"))


@refused(ValueError, where="tokenizer.json", got="got null", rule="expected an object")
def a_tokenizer_that_is_null(tmp):
    write(tmp / "config.json", "{}")
    write(tmp / "tokenizer.json", "null")
    load_model(str(tmp))


@refused(ValueError, where="config.json:1", got="got a file with: Expecting value", rule="expected JSON")
def a_model_config_that_is_no_json(tmp):
    read_model_config(str(write(tmp / "config.json", "hidden_size: 64")))


@refused(ValueError, where="mine has", got="mlp_only_layers=[0]", rule="model must have experts in every layer")
def a_mixture_to_be_estimated_with_dense_layers():
    shape_from_config(known_config("qwen3-30b-a3b") | {"mlp_only_layers": [0]}, "mine")


# ---------------------------------------------------------------------------------------------- configurations


@refused(ValueError, where="run.yaml", got="'train.stpes'", rule="unknown key", remedy="did you mean train.steps?")
def a_configuration_with_a_misspelt_key(tmp):
    load_config(write(tmp / "run.yaml", "train: {stpes: 1}"))


@refused(
    ValueError, where="run.yaml", got="'mask.sparsity'", rule="unknown key", remedy="did you mean mask.keep_ratio?"
)
def a_configuration_in_the_words_of_the_papers_code(tmp):
    load_config(write(tmp / "run.yaml", "mask: {sparsity: 0.9}"))


@refused(
    ValueError,
    where="run.yaml:3:3",
    got="'lr'",
    rule="the key 'lr' stands twice, first in line 2",
    remedy="leave one out",
)
def a_configuration_with_a_key_twice(tmp):
    load_config(write(tmp / "run.yaml", "train:\n  lr: 1\n  lr: 2\n"))


@refused(ValueError, where="train.steps", got="1.5 (float)", rule="must be an int or null")
def a_configuration_with_half_a_step(tmp):
    load_config(write(tmp / "run.yaml", "train: {steps: 1.5}"))


@refused(ValueError, where="mask.keep_ratio", got="90", rule="must lie in [0, 1]")
def a_configuration_with_a_keep_ratio_in_percent():
    load_config(None, ["mask.keep_ratio=90"])


@refused(
    ValueError,
    where="train.keep_best",
    got="got True",
    rule="must be false unless eval_every or eval_minutes says when to evaluate",
)
def a_best_step_that_no_evaluation_finds():
    load_config(None, ["train.keep_best=true"])


@refused(ValueError, where="train.eval_minutes", got="got 5.0", rule="must be null beside eval_every = 100")
def an_evaluation_every_so_many_steps_and_minutes():
    load_config(None, ["train.eval_every=100", "train.eval_minutes=5"])


@refused(
    ValueError,
    where="report_to",
    got="got ['tensorbord']",
    rule="must be one of tensorboard, trackio, wandb",
    remedy="did you mean tensorboard?",
)
def a_tracker_that_is_misspelt():
    load_config(None, ["report_to=tensorbord"])


@refused(
    ValueError,
    where="override",
    got="'train.load_best_model_at_end'",
    rule="unknown key",
    remedy="did you mean train.keep_best?",
)
def an_override_in_the_words_of_transformers():
    load_config(None, ["train.load_best_model_at_end=true"])


@refused(ValueError, where="run.yaml", got="byte 0 is not", rule="config must be UTF-8 text")
def a_configuration_in_another_encoding(tmp):
    (tmp / "run.yaml").write_bytes(b"\xff\xfe\x00")
    load_config(tmp / "run.yaml")


@refused(
    ValueError,
    where="config",
    got="rnu.yaml",
    rule="must be a YAML file that exists",
    remedy="did you mean /tmp/dir/run.yaml?",
)
def a_configuration_that_is_misspelt(tmp):
    write(tmp / "run.yaml", "output_dir: a")
    load_config(tmp / "rnu.yaml")


@refused(ValueError, where="config", got="papr", rule="must be a YAML file or one of", remedy="did you mean paper?")
def a_shipped_configuration_that_is_misspelt():
    load_config("papr")


@refused(ValueError, where="override", got="'train.lr'", rule="must look like train.lr=3e-4")
def an_override_without_a_value():
    load_config(None, ["train.lr"])


@refused(ValueError, where="layers_to_transform", got="'3-1'", rule="must have ranges that rise")
def a_falling_range_of_layers():
    parse_layers("3-1")


@refused(
    ValueError,
    where="layers_to_transform",
    got="'0-99999999999'",
    rule="must count layers below 10000",
    remedy="give the model's own",
)
def a_range_of_more_layers_than_any_model_has():
    parse_layers("0-99999999999")


@refused(
    ValueError,
    where="run.yaml",
    got="aliases that stand for more than 100000 values",
    rule="broken YAML",
    remedy="write out what is meant",
)
def a_configuration_of_six_lines_that_stands_for_a_million_values(tmp):
    lines = [f"- &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 6)]
    load_config(write(tmp / "run.yaml", "\n".join(["output_dir:", "- &a0 [1, 1]", *lines])))


@refused(
    ValueError,
    where="output_dir",
    got="with notes.txt",
    rule="must be new, empty or a run's",
    remedy="name another one",
)
def a_run_in_a_directory_of_something_else(tmp):
    write(tmp / "notes.txt", "mine")
    check_run_directory(tmp, overwrite=True)


# ---------------------------------------------------------------------------------------------- accepted


@accepted("its masks are used, exactly as stored")
def masks_of_another_base_with_force(tmp):
    masked = masked_llama()
    save_masks(masked, tmp / "masks")
    model = make_llama()
    with torch.no_grad():
        model.get_submodule(UP).weight[0, 0] += 1
    load_masks(model, tmp / "masks", force=True)
    for name, module in masked_modules(model).items():
        assert torch.equal(module.mask(), masked_modules(masked)[name].mask())


@accepted("they are replaced, as a whole: at no moment does half an export lie there")
def masks_saved_over_earlier_ones(tmp):
    masks_in(tmp)
    save_masks(masked_llama(keep_ratio=0.5), tmp / "masks")
    assert json.loads((tmp / "masks" / CONFIG).read_text())["keep_ratio"] == 0.5
    assert sorted(os.listdir(tmp)) == ["masks"]


@accepted("the one before it is taken, and why is said")
def a_damaged_checkpoint_beside_an_older_one(tmp):
    older, newer = checkpoint_in(tmp / "a"), checkpoint_in(tmp / "b", 4)
    newer.rename(older.parent / newer.name)
    os.truncate(older.parent / newer.name / "state.json", 2)
    found, skipped = newest_checkpoint(tmp / "a")
    assert found.step == 3
    assert re.search(r"state.json: expected bytes \d+, got 2", skipped[0])


@accepted("the head and the embedding stay tied, and are not masked")
def a_head_tied_to_the_embedding():
    model = mask_model(make_llama(tie_word_embeddings=True), MaskConfig(target_modules="all-linear"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head" not in masked_modules(model)


@accepted("numbers: 3e-4, which YAML 1.1 takes for text, and 1e2 for a count")
def numbers_in_a_configuration(tmp):
    config = load_config(write(tmp / "run.yaml", "train: {lr: 3e-4, steps: 1e2}"))
    assert (config.train.lr, config.train.steps) == (3e-4, 100)
