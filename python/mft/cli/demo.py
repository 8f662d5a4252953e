"""mft demo: the whole recipe on a real model in minutes; SmolLM2-135M learns the source of the standard library.

The study of configs/compare/demo.yaml; then the mask that it chose, merged, reloaded with plain transformers, and a
sample of what that model writes.
"""

import contextlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from mft.cli.generate import Sampling, Voices
from mft.cli.study import run_compare
from mft.config import CONFIG, ModelConfig, RunConfig
from mft.config_file import save_config
from mft.masks.convert import merge_model
from mft.masks.export import put_masks, save_masks
from mft.masks.location import MASKS
from mft.models.causal_lm import clone_with_own_weights
from mft.models.pretrained import save_model
from mft.study.config import FULL, MASK, StudyConfig
from mft.study.load import load_study
from mft.study.report.finished import Finished, opened
from mft.study.store import STUDY
from mft.tracking.console import say
from mft.tracking.curves import PLOT
from mft.training.run_directory import MODEL, TABLE_JSON, TABLE_MARKDOWN, next_steps
from mft_kernels import pack_mask

BASE = "base"
LEFT = f"""   {TABLE_MARKDOWN}, {TABLE_JSON}, {PLOT}: what is above, and a picture of it
   {BASE}/: the full fine-tune, which the masks are for
   {MASKS}/: the masks, entropy-coded
   {MODEL}/: the merged model, for AutoModelForCausalLM.from_pretrained
   units/, trained/, test/: every run; mft plot surface draws from them"""
BEFOREHAND = """What the file of the study fixes was chosen beforehand on the same validation split: the keep ratio, the
fine-tune's rate, no momentum. mft compare --config smollm2 leaves more of it to choose, in three seeds."""
PROMPT = 'def read_lines(path):\n    """Return the lines of a text file, without their line ends."""\n    with open('


def demo_study(output: Path) -> StudyConfig:
    """The shipped study, in the dtype that is the faster one here."""
    study = load_study("demo")
    return replace(study, model=replace(study.model, dtype=faster_dtype()), output_dir=str(output))


def run_demo(study: StudyConfig, *, overwrite: bool | None = None) -> None:
    """Run the study, and make what its first MFT arm has learned on the first domain from the first seed a model.

    overwrite: delete what lies in study.output_dir; None: if it is a finished demo. Else what is there goes on.
    """
    begin, directory = time.perf_counter(), Path(study.output_dir)
    if overwrite is None:
        overwrite = (directory / STUDY).is_file() and (directory / MODEL).exists()
    _title(f"1. {study.model.name} in {study.model.dtype}: a full fine-tune, and what can be made of it")
    run_compare(study, overwrite=overwrite)
    say(BEFOREHAND)
    _title("2. The masks become an ordinary model, which plain transformers reloads")
    with opened(directory) as finished:
        _merge(finished, directory)
    _title(f"Done in {time.perf_counter() - begin:.0f} s. Files in {directory}/:")
    say("\n".join([LEFT, "Next:", *(f"   {command}" for command in next_steps(directory))]))


def faster_dtype() -> str:
    """bfloat16 where this CPU multiplies it at least as fast as float32; old ones emulate it."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(512, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        a @ b
        begin = time.perf_counter()
        for _ in range(5):
            a @ b
        seconds[dtype] = time.perf_counter() - begin
    return "bfloat16" if seconds[torch.bfloat16] <= seconds[torch.float32] else "float32"


def _title(text: str) -> None:
    say(f"\n{text}", style="bold")


@torch.no_grad()
def _merge(finished: Finished, directory: Path) -> None:
    """base/, config.yaml, masks/ and model/ of a finished study: as mft train on the fine-tune would have left them."""
    study, domain, seed = finished.study, next(iter(finished.study.domains)), finished.study.seeds[0]
    arm, tokenizer = finished.arm(MASK), finished.workspace.tokenizer
    setting, config = finished.chosen(domain, arm), study.mask_of(study.arms[arm])
    tested = finished.model(domain, arm, seed).to("cpu")
    base = finished.model(domain, finished.arm(FULL), seed).to("cpu")
    kept = {key.removesuffix(".weight"): ~gone for key, gone in finished.dropped(domain, arm, seed).items()}
    masked = put_masks(
        clone_with_own_weights(base),
        {name: pack_mask(mask.float(), torch.tensor(0.5)) for name, mask in kept.items()},
        {name: (mask.shape[0], mask.shape[1]) for name, mask in kept.items()},
        mode=config.mode,
        keep_ratio=setting.keep_ratio,
    )
    run = RunConfig(
        ModelConfig(str(directory / BASE), dtype=study.model.dtype),
        study.domains[domain],
        replace(config, seed=seed, keep_ratio=setting.keep_ratio or config.keep_ratio),
        study.train_of(study.arms[arm], setting, seed),
        output_dir=str(directory),
        memory="plain",
    )
    save_config(run, directory / CONFIG)
    save_model(base, tokenizer, directory / BASE)
    save_masks(masked, directory / MASKS, base_model_name_or_path=run.model.name)
    save_model(merge_model(masked), tokenizer, directory / MODEL)
    disable_progress_bar()  # of weights that load in a blink
    reloaded = AutoModelForCausalLM.from_pretrained(directory / MODEL, dtype="auto").eval()
    say(f"   {_check_bits(base, tested, masked, reloaded)}")
    say("   It continues (greedily; the first lines are given):")
    say(_generate(reloaded, tokenizer), style="cyan")


def _check_bits(base: nn.Module, tested: nn.Module, merged: nn.Module, reloaded: nn.Module) -> str:
    """Reloaded == merged, bit by bit, == what test saw; each weight of merged is the fine-tuned model's or +0."""
    found, before, seen = (dict(model.named_parameters()) for model in (reloaded, base, tested))
    total = dropped = 0
    for name, weight in merged.named_parameters():
        bits = torch.int16 if weight.element_size() == 2 else torch.int32
        if not torch.equal(weight.view(bits), found[name].view(bits)):
            raise RuntimeError(f"the reloaded model must be bit-equal to the merged one, {name} differs")
        if not torch.equal(weight, seen[name]):
            raise RuntimeError(f"the merged model must be the one that the test split saw, {name} differs")
        differs = weight.view(bits) != before[name].view(bits)
        if (weight.view(bits)[differs] != 0).any():
            raise RuntimeError(f"merging must keep weights or set them to +0, {name} holds another value")
        total, dropped = total + weight.numel(), dropped + int(differs.sum())
    return (
        f"bit-equal: all {total:,} weights read back as written; {dropped:,} of them were set to 0, the others are "
        "the full fine-tune's own bits"
    )


def _generate(model: Any, tokenizer: Any, tokens: int = 48) -> str:
    voices = Voices(model, tokenizer, {MODEL: contextlib.nullcontext})
    return PROMPT + voices.answer(MODEL, voices.prompt(PROMPT), Sampling(tokens))
