"""How the demo's keep ratio was chosen: a grid over keep ratios and rates on the validation split; test stays closed.

python -m mft.demo_grid [directory]; about ten minutes on two cores. The demo itself chooses between rates only.
"""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mft.causal_lm import first_trainable_layer
from mft.clones import clone_with_own_weights
from mft.config import ModelConfig
from mft.convert import mask_model, masked_modules
from mft.data import load_splits
from mft.demo import CONTROL_LRS, DATA, FULL, MASK, MASK_LRS, MASK_TRAIN, MODEL_NAME, faster_dtype
from mft.evaluate import paired_difference
from mft.inspection import flip_share, initial_masks
from mft.models import load_model
from mft.prefix import PrefixMemory
from mft.progress import Progress
from mft.recipe import finetune, train_masks, train_weights
from mft.recorder import Recorder

KEEP_RATIOS = (0.9, 0.97, 0.99, 0.997)


def run_grid(directory: Path) -> list[dict]:
    """Full fine-tune as in the demo, then every pair of KEEP_RATIOS and MASK_LRS, and the control; writes grid.json."""
    recorder = Recorder(progress=Progress(Console()))
    model, tokenizer = load_model(ModelConfig(MODEL_NAME, dtype=faster_dtype()))
    splits = load_splits(DATA, tokenizer)
    with recorder.training("full fine-tune", splits.train, FULL) as on_step:
        finetune(model, splits.train, FULL, on_step=on_step)
    model.requires_grad_(False)
    masked = mask_model(clone_with_own_weights(model), MASK)
    names, first = list(masked_modules(masked)), first_trainable_layer(masked)
    train_memory, memory = PrefixMemory(), PrefixMemory()
    start = recorder.evaluate("full fine-tune, validation", model, splits.validation, first=first, memory=memory)
    found = []
    for keep_ratio, lr in [(None, lr) for lr in CONTROL_LRS] + [(k, lr) for k in KEEP_RATIOS for lr in MASK_LRS]:
        train, flips = replace(MASK_TRAIN, lr=lr), None
        phase = f"lr {lr:g}, " + ("control" if keep_ratio is None else f"keep {keep_ratio:g}")
        with recorder.training(phase, splits.train, train) as on_step:
            if keep_ratio is None:
                candidate = clone_with_own_weights(model, names)
                train_weights(candidate, names, splits.train, train, memory=train_memory, on_step=on_step)
            else:
                candidate = mask_model(clone_with_own_weights(model), replace(MASK, keep_ratio=keep_ratio))
                initial = initial_masks(candidate)
                train_masks(candidate, splits.train, train, memory=train_memory, on_step=on_step)
                flips = flip_share(candidate, initial)
        result = recorder.evaluate(f"{phase}, validation", candidate, splits.validation, first=first, memory=memory)
        difference, error = paired_difference(result, start)
        found.append(
            {
                "keep_ratio": keep_ratio,
                "lr": lr,
                "loss - full fine-tune": difference,
                "standard error": error,
                "flips": flips,
            }
        )
    directory.mkdir(parents=True, exist_ok=True)
    settings = {"data": asdict(DATA), "mask": asdict(MASK), "train": asdict(MASK_TRAIN), "full": asdict(FULL)}
    (directory / "grid.json").write_text(
        json.dumps(settings | {"validation": found}, indent=2) + "\n", encoding="utf-8"
    )
    return found


if __name__ == "__main__":
    table = Table("keep ratio", "lr", "validation loss - full fine-tune", "flips")
    for row in run_grid(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo_grid")):
        kept = "control" if row["keep_ratio"] is None else f"{row['keep_ratio']:g}"
        flips = "" if row["flips"] is None else f"{100 * row['flips']:.2f} %"
        table.add_row(
            kept, f"{row['lr']:g}", f"{row['loss - full fine-tune']:+.4f} +- {row['standard error']:.4f}", flips
        )
    Console().print(table)
