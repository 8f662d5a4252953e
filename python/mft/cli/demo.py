"""mft demo: train a mask on a small model, from the model's first words to the merged model, in minutes on two cores.

It is a run of mft train with configs/demo.yaml. Around it, the demo shows what a mask is: the same prompt before and
after, the sizes of the files, and the merged model in plain transformers.
"""

import contextlib
import dataclasses
import json
import shlex
import time
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from mft.cli.generate import Sampling, Voices
from mft.cli.masks import run_merge
from mft.config import CONFIG, RunConfig
from mft.config_file import load_config, load_saved
from mft.masks.convert import masked_modules
from mft.masks.export import load_masks
from mft.masks.export_format import MASK_FILE
from mft.masks.location import MASKS
from mft.models.pretrained import load_model
from mft.tracking.console import console, say
from mft.tracking.curves import PLOT
from mft.tracking.metrics import METRICS, read_recorder
from mft.training.resume import Begin
from mft.training.run_directory import MODEL, TABLE_JSON, check_run_directory
from mft.training.training_run import run_train

ABOUT = "It is SmolLM2-135M-Instruct from a file of 4-bit weights, dequantised."
PLOT_TITLE = "SmolLM2-135M on Python source: a mask on all layers is trained"
CHOSEN = "The settings are the defaults, which were chosen on validation documents of this text and two others."
# One of eleven tried prompts. With it, the mask's text clearly follows the library's style; others differ less.
PROMPT = "def parse_args("
TOKENS = 48
COLUMNS = 100  # width of a terminal that has room for two texts side by side


def demo_config(output: Path) -> RunConfig:
    """Return the shipped configuration, in the dtype that is faster on this machine."""
    return load_config("demo", [f"model.dtype={faster_dtype()}", f"output_dir={json.dumps(str(output))}"])


def run_demo(config: RunConfig, *, overwrite: bool = False) -> None:
    """Run config and explain each step. The run is written to its output_dir, with the merged model in model/.

    overwrite: delete any existing run there. The run of an earlier demo is always deleted.
    Raises: ValueError if output_dir holds anything else.
    """
    begin, directory = time.perf_counter(), Path(config.output_dir)
    start = Begin(config, overwrite=overwrite or _is_earlier_demo(config))
    check_run_directory(directory, overwrite=start.overwrite)  # before the model is fetched

    _title("1. The base model, and how it continues a prompt")
    model, tokenizer = load_model(config.model)
    weights = sum(weight.numel() for weight in model.parameters())
    size = sum(weight.nbytes for weight in model.parameters())
    say(f"{config.model.name}: {weights:,} weights, {size / 1e6:,.0f} MB in {config.model.dtype}. {ABOUT}")
    before = _continue(model, tokenizer)
    say(f"\n{before}", style="cyan")

    _title(f"2. A mask learns from {config.data.source}; the weights stay as they are")
    masks = run_train(start)
    say(_difference(directory))
    say(CHOSEN)

    _title("3. The same prompt without and with the mask (the likeliest token each time)")
    load_masks(model, masks)
    _show({"before": before, "after": _continue(model, tokenizer)})

    _title("4. The mask becomes an ordinary model, which plain transformers reads back")
    run_merge(str(directory), directory / MODEL, None, None, force=False)
    disable_progress_bar()  # the weights load at once
    say(_check_bits(model, AutoModelForCausalLM.from_pretrained(directory / MODEL, dtype="auto")))

    _title("5. What is stored")
    model_bytes = sum(path.stat().st_size for path in (directory / MODEL).glob("*.safetensors"))
    sizes = {"model": model_bytes, "mask": (masks / MASK_FILE).stat().st_size}
    smaller = sizes["model"] / sizes["mask"]
    say(f"model: {sizes['model']:,} bytes; mask: {sizes['mask']:,} bytes, {smaller:.0f} times smaller")
    read_recorder(directory / METRICS).draw(directory / PLOT, title=PLOT_TITLE, sizes=sizes)

    _title(f"Done in {time.perf_counter() - begin:.0f} s")
    say(f"""Files in {directory}/:
   {MASKS}/: the mask
   {MODEL}/: the merged model, for AutoModelForCausalLM.from_pretrained
   {PLOT}: loss by step, and the sizes

Next:
   a mask from your own chats, a JSON object per line (docs/how-to/data.md):
   mft train model.name=smollm2-135m data.source=chats.jsonl output_dir=runs/mine
   compare that mask with LoRA and with training the weights (hours; docs/how-to/comparison.md):
   mft compare --config own data.source=chats.jsonl
   an HTTP server in OpenAI's form; the model's name is demo:
   mft serve --masks {shlex.quote(f"demo={directory}")}""")


def faster_dtype() -> str:
    """Return bfloat16 if this CPU multiplies it at least as fast as float32, else float32. Old CPUs emulate it."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(512, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        a @ b
        begin = time.perf_counter()
        for _ in range(5):
            a @ b
        seconds[dtype] = time.perf_counter() - begin
    return "bfloat16" if seconds[torch.bfloat16] <= seconds[torch.float32] else "float32"


# ---------------------------------------------------------------------------------------------- private


def _title(text: str) -> None:
    say(f"\n{text}", style="bold")


def _is_earlier_demo(config: RunConfig) -> bool:
    """Return whether output_dir holds a run of this configuration, in any dtype and from any output_dir."""
    path = Path(config.output_dir) / CONFIG
    if not path.is_file():
        return False
    there = load_saved(path)
    model = dataclasses.replace(there.model, dtype=config.model.dtype)
    return dataclasses.replace(there, model=model, output_dir=config.output_dir) == config


def _continue(model: Any, tokenizer: Any) -> str:
    voices = Voices(model, tokenizer, {MODEL: contextlib.nullcontext})
    return PROMPT + voices.answer(MODEL, voices.prompt(PROMPT), Sampling(TOKENS))


def _difference(directory: Path) -> str:
    """Return the difference in the run's table, in words."""
    found = json.loads((directory / TABLE_JSON).read_text(encoding="utf-8"))
    difference, error = found["loss after - before"], found["standard error"]
    low, high = difference - 2 * error, difference + 2 * error
    return (
        f"loss on {found['documents']} documents that it was not trained on: {difference:+.3f} nats per token, "
        f"between {low:+.3f} and {high:+.3f} (two standard errors)"
    )


def _show(texts: dict[str, str]) -> None:
    """Print the texts side by side if there is room, else one below the other."""
    if console.is_terminal and console.width >= COLUMNS:
        table = Table(*texts, padding=(0, 2, 0, 0), box=None, expand=True)
        table.add_row(*texts.values())
        console.print(table)
        return
    for name, text in texts.items():
        say(f"\n{name}:", style="bold")
        say(text, style="cyan")


@torch.no_grad()
def _check_bits(masked: nn.Module, reloaded: nn.Module) -> str:
    """Return a line that says that each weight of reloaded is bit-equal to the base, or +0 where the mask drops it.

    Raises: RuntimeError if a weight differs.
    """
    dropped = {f"{name}.weight": ~module.mask() for name, module in masked_modules(masked).items()}
    base, zeros = dict(masked.named_parameters()), 0
    for name, weight in reloaded.named_parameters():
        bits = torch.int16 if weight.element_size() == 2 else torch.int32
        wanted, gone = base[name].view(bits), dropped.get(name)
        if gone is not None:
            wanted, zeros = wanted.masked_fill(gone, 0), zeros + int(gone.sum())
        if not torch.equal(weight.view(bits), wanted):
            raise RuntimeError(
                f"the merged model must hold the base's bits, and +0 where the mask drops a weight; {name} differs"
            )
    total = sum(weight.numel() for weight in reloaded.parameters())
    return f"bit-equal: {zeros:,} of {total:,} weights are 0 now, the others have the base model's own bits"
