"""The whole recipe on a real model in minutes on two cores: SmolLM2-135M learns the standard library's source.

Full fine-tune, masks and their baselines, test table, merge, reload with plain transformers, a generated sample.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from mft.config import DataConfig, MaskConfig, ModelConfig, RunConfig, TrainConfig
from mft.data.splits import load_splits
from mft.demo.compare import Comparison, compare
from mft.demo.report import console_table, remarks, verdict, write_report
from mft.masks.convert import merge_model
from mft.masks.export import MASKS, save_masks
from mft.models.pretrained import load_model, save_model
from mft.training.console import console
from mft.training.loop import finetune
from mft.training.metrics import Recorder
from mft.training.progress import Progress
from mft.training.run_directory import (
    BASE,
    METRICS,
    MODEL,
    PLOT,
    TABLE_MARKDOWN,
    check_run_directory,
    holding,
    next_steps,
    open_run,
)

MODEL_NAME = "smollm2-135m"
DATA = DataConfig(source="stdlib", sequence_length=256, max_train_tokens=96 * 256, max_eval_tokens=64 * 256)
FULL = TrainConfig(lr=1e-4, epochs=1.0, batch_size=4, warmup_ratio=0.05)
LAYERS = list(range(24, 30))
MASK = MaskConfig(layers_to_transform=LAYERS, keep_ratio=0.99, init="magnitude")
MASK_TRAIN = TrainConfig(lr=1e-3, epochs=1.0, batch_size=4, warmup_ratio=0.05)
MASK_LRS = (3e-4, 1e-3, 3e-3)
CONTROL_LRS = (3e-5, 1e-4, 3e-4)
KEEP_RATIO_NOTE = (
    f"The keep ratio, {MASK.keep_ratio:g}, was chosen beforehand on the same validation split, among 4 ratios with 3 "
    "rates each (python -m benchmarks.demo_grid); at the paper's 0.9 no rate helped in so short a run."
)
PROMPT = 'def read_lines(path):\n    """Return the lines of a text file, without their line ends."""\n    with open('


def run_demo(
    output: Path, *, overwrite: bool = True, recorder_of: Callable[[Path, Progress], Recorder] = Recorder
) -> Comparison:
    """Run all phases; their files go to output. recorder_of is what records a phase."""
    check_run_directory(output, overwrite=overwrite)
    with holding(output):
        return _run_demo(output, overwrite=overwrite, recorder_of=recorder_of)


def _run_demo(output: Path, *, overwrite: bool, recorder_of: Callable[[Path, Progress], Recorder]) -> Comparison:
    begin = time.perf_counter()
    start = ModelConfig(MODEL_NAME, dtype=faster_dtype())
    tuned = replace(start, name=str(output / BASE))  # what the masks are for, and so the model of their run
    config = RunConfig(tuned, DATA, MASK, MASK_TRAIN, output_dir=str(output), memory="plain")
    directory = open_run(output, config, overwrite=overwrite)
    recorder = recorder_of(directory, Progress(console))

    _say(console, f"1. Load {MODEL_NAME} in {start.dtype}, and the standard library's source")
    base, tokenizer = load_model(start)
    splits = load_splits(config.data, tokenizer)
    for note in splits.notes:
        console.print(f"   {note}", style="dim", highlight=False, soft_wrap=True)

    _say(console, f"2. Full fine-tune: all {sum(p.numel() for p in base.parameters()):,} weights, rate annealed to 0")
    model, _ = load_model(start)
    with recorder.training("full fine-tune", splits.train, FULL) as on_step:
        finetune(model, splits.train, FULL, on_step=on_step)
    save_model(model, tokenizer, directory / BASE)

    _say(
        console,
        f"3. Layers {LAYERS[0]} to {LAYERS[-1]} of it: train masks and, as a control, the weights; choose the "
        "rates on validation; open the test split",
    )
    comparison = compare(
        model, splits, MASK, MASK_TRAIN, mask_lrs=MASK_LRS, control_lrs=CONTROL_LRS, base=base, recorder=recorder
    )
    comparison.notes.append(KEEP_RATIO_NOTE)
    save_masks(comparison.masked, directory / MASKS, base_model_name_or_path=config.model.name)
    write_report(comparison, directory, recorder.curves, splits.notes)
    console.print(console_table(comparison))
    console.print(verdict(comparison), style="bold", highlight=False, soft_wrap=True)
    for line in remarks(comparison):
        console.print(f"   {line}", highlight=False, soft_wrap=True)

    _say(console, "4. Merge the masks into an ordinary model, reload it with plain transformers")
    merged = merge_model(comparison.masked)
    save_model(merged, tokenizer, directory / MODEL)
    reloaded = _reload(directory / MODEL)
    console.print(f"   {_check_bit_equal(model, merged, reloaded)}", highlight=False, soft_wrap=True)
    console.print("   It continues (greedily; the first lines are given):", highlight=False)
    console.print(_generate(reloaded, tokenizer), style="cyan", markup=False, highlight=False)

    _say(console, f"Done in {time.perf_counter() - begin:.0f} s. Files in {directory}/:")
    for name, what in (
        (TABLE_MARKDOWN, "the table above"),
        (PLOT, "training curves and differences"),
        (METRICS, "every step and evaluation"),
        (f"{BASE}/", "the full fine-tune, which the masks are for"),
        (f"{MASKS}/", "the masks, 1 bit a weight"),
        (f"{MODEL}/", "the merged model, for AutoModelForCausalLM.from_pretrained"),
    ):
        console.print(f"   {name:<14} {what}", highlight=False)
    console.print("Next:", highlight=False)
    for command in next_steps(directory):
        console.print(f"   {command}", highlight=False, soft_wrap=True)
    return comparison


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


def _say(console: Console, text: str) -> None:
    console.print(f"\n{text}", style="bold", highlight=False, soft_wrap=True)


def _reload(directory: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of weights that load in a blink
    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()


def _check_bit_equal(base: nn.Module, merged: nn.Module, reloaded: nn.Module) -> str:
    """Reloaded == merged, bit by bit; each weight of merged is the fine-tuned model's or +0."""
    expected, found = dict(merged.named_parameters()), dict(reloaded.named_parameters())
    before = dict(base.named_parameters())
    dropped = 0
    for name, weight in expected.items():
        bits = torch.int16 if weight.element_size() == 2 else torch.int32
        if not torch.equal(weight.view(bits), found[name].view(bits)):
            raise RuntimeError(f"the reloaded model must be bit-equal to the merged one, {name} differs")
        differs = weight.view(bits) != before[name].view(bits)
        if (weight.view(bits)[differs] != 0).any():
            raise RuntimeError(f"merging must keep weights or set them to +0, {name} holds another value")
        dropped += int(differs.sum())
    total = sum(w.numel() for w in expected.values())
    return (
        f"bit-equal: all {total:,} weights read back as written; {dropped:,} of them were set to 0, the others are "
        "the full fine-tune's own bits"
    )


def _generate(model: Any, tokenizer, tokens: int = 48) -> str:
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(output[0], skip_special_tokens=True)


if __name__ == "__main__":
    run_demo(Path("runs/demo"))
