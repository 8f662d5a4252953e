"""How the demo's keep ratio was chosen: keep ratios and rates on the validation split; the test split stays closed.

python -m benchmarks.demo_grid [directory]; about five minutes on two cores. The demo itself chooses between rates only.
Validation loss - full fine-tune's, in bf16 on Python 3.11's library (standard errors 0.001 to 0.014):

    keep ratio    lr 3e-4    lr 1e-3    lr 3e-3
    0.9           +0.0028    +0.0481    +0.2113
    0.97          -0.0075    -0.0101    +0.0173
    0.99          -0.0070    -0.0155    -0.0141
    0.997         -0.0041    -0.0082    -0.0136
"""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from mft.config import ModelConfig
from mft.data.splits import load_splits
from mft.demo.run import DATA, FULL, MASK, MASK_LRS, MASK_TRAIN, MODEL_NAME, faster_dtype
from mft.evaluation.evaluate import paired_difference
from mft.masks.convert import mask_model
from mft.masks.inspection import flip_share, initial_masks
from mft.models.causal_lm import clone_with_own_weights, first_trainable_layer
from mft.models.frozen_layers import PrefixMemory
from mft.models.pretrained import load_model
from mft.training.console import console
from mft.training.loop import finetune, train_masks
from mft.training.metrics import Recorder
from mft.training.progress import Progress

KEEP_RATIOS = (0.9, 0.97, 0.99, 0.997)


def run_grid(directory: Path) -> list[dict]:
    """The demo's full fine-tune, then masks for every pair of KEEP_RATIOS and MASK_LRS; written to grid.json."""
    recorder = Recorder(progress=Progress(console))
    model, tokenizer = load_model(ModelConfig(MODEL_NAME, dtype=faster_dtype()))
    splits = load_splits(DATA, tokenizer)
    with recorder.training("full fine-tune", splits.train, FULL) as on_step:
        finetune(model, splits.train, FULL, on_step=on_step)
    model.requires_grad_(False)
    first = first_trainable_layer(mask_model(clone_with_own_weights(model), MASK))
    on_train, on_validation = PrefixMemory(), PrefixMemory()
    start = recorder.evaluate("validation", model, splits.validation, first=first, memory=on_validation)
    found = []
    for keep_ratio, lr in [(keep_ratio, lr) for keep_ratio in KEEP_RATIOS for lr in MASK_LRS]:
        candidate = mask_model(clone_with_own_weights(model), replace(MASK, keep_ratio=keep_ratio))
        initial, train = initial_masks(candidate), replace(MASK_TRAIN, lr=lr)
        with recorder.training(f"keep {keep_ratio:g}, lr {lr:g}", splits.train, train) as on_step:
            train_masks(candidate, splits.train, train, memory=on_train, on_step=on_step)
        result = recorder.evaluate("validation", candidate, splits.validation, first=first, memory=on_validation)
        difference, error = paired_difference(result, start)
        flips = flip_share(candidate, initial)
        found.append({"keep_ratio": keep_ratio, "lr": lr, "difference": difference, "error": error, "flips": flips})
        console.print(
            f"keep {keep_ratio:g}, lr {lr:g}: validation loss - full fine-tune {difference:+.4f}±{error:.4f}, "
            f"{100 * flips:.2f} % of the mask's bits flipped",
            highlight=False,
            style="bold",
        )
    directory.mkdir(parents=True, exist_ok=True)
    settings = {"data": asdict(DATA), "full": asdict(FULL), "mask": asdict(MASK), "train": asdict(MASK_TRAIN)}
    (directory / "grid.json").write_text(json.dumps(settings | {"validation": found}, indent=2) + "\n")
    return found


if __name__ == "__main__":
    run_grid(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo_grid"))
