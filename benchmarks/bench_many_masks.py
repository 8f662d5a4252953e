"""Measure what many masks on one base give and cost: three tasks on SmolLM2-135M, compared with three merged models.

Three short mask trainings (layers 24 to 29, keep 0.99, as in the demo) use the standard library's Python, torch's C++
headers and problems with exact answers. Reported are the held-out loss of every task under every mask, and the bytes
of masks and merged models on disk and in memory, also of masks on all linear layers. For speed see bench_serve.py.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mft.config import DataConfig, MaskConfig, TrainConfig
from mft.data.splits import Splits, load_splits
from mft.evaluation.evaluate import Evaluation, evaluate, paired_difference
from mft.masks.bank import MaskBank, load_mask_bank
from mft.masks.convert import mask_model, merge_model
from mft.masks.export import load_masks, save_masks
from mft.models.frozen_layers import PrefixMemory
from mft.models.pretrained import load_model, save_model
from mft.training.loop import train_masks

from .harness import Finding, Spread, report
from .serve_load import write_masks

MODEL = "smollm2-135m"
FIRST = 24  # first masked layer, of 30
MASK = MaskConfig(layers_to_transform=list(range(FIRST, 30)), keep_ratio=0.99, init="magnitude")
STEPS, TRAINED, HELD_OUT = 16, 64 * 128, 32 * 128  # tokens per task
TASKS = {
    "python": DataConfig("stdlib", sequence_length=128, max_train_tokens=TRAINED, max_eval_tokens=HELD_OUT),
    "c++": DataConfig("headers", sequence_length=128, max_train_tokens=TRAINED, max_eval_tokens=HELD_OUT),
    # A problem is one row of validation, and has fewer than 64 tokens.
    "problems": DataConfig("problems", sequence_length=64, max_train_tokens=TRAINED, max_eval_tokens=HELD_OUT),
}
BASE = "base"


def main() -> None:
    """Print and store the answer."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        _, tokenizer = load_model(MODEL)
        splits = {task: load_splits(config, tokenizer) for task, config in TASKS.items()}
        for task in TASKS:
            train(task, splits[task], root)
        model, _ = load_model(MODEL)
        bank = load_mask_bank(model, {task: root / task for task in TASKS})
        losses = losses_by_mask(bank, {task: splits[task].validation for task in TASKS}, FIRST)
        apart, sizes = merge_all(bank, losses, splits, tokenizer, root)
        sizes |= bytes_of(bank)
        sizes |= {f"{name}, all layers": size for name, size in bytes_of(bank_of_all_layers(root)).items()}
    findings = [Finding("bank's loss against the merged model's, largest difference", Spread.of([apart]), "nats")]
    findings += [Finding(name, Spread.of([float(size)]), "bytes") for name, size in sizes.items()]
    report("many_masks", "Three tasks on one SmolLM2-135M", findings, losses=loss_rows(losses), bytes=sizes)


def train(task: str, splits: Splits, root: Path) -> None:
    """Train for one epoch, and save the masks in root/task."""
    model, _ = load_model(MODEL)
    mask_model(model, MASK)
    settings = TrainConfig(lr=1e-3, steps=STEPS, batch_size=len(splits.train) // STEPS, warmup_ratio=0.05)
    reports = train_masks(model, splits.train, settings, remember=False)
    save_masks(model, root / task)
    print(
        f"{task}: {reports[-1].seconds:.0f} s of training, loss {reports[0].loss:.3f} -> {reports[-1].loss:.3f}",
        flush=True,
    )


def losses_by_mask(bank: MaskBank, data: Mapping[str, Any], first: int) -> dict[str, dict[str, Evaluation]]:
    """Return each task's loss under the bare base and under each mask. The first layers are masked in none of them."""
    found: dict[str, dict[str, Evaluation]] = {}
    for task, rows in data.items():
        memory = PrefixMemory()
        found[task] = {}
        for mask in (None, *bank.tasks):
            with bank.use(mask):
                found[task][mask or BASE] = evaluate(bank.model, rows, batch_size=4, first=first, memory=memory)
    return found


def loss_rows(losses: Mapping[str, Mapping[str, Evaluation]]) -> list[dict[str, Any]]:
    """Return one row per task and mask: nats per token, difference from the base, its standard error over documents."""
    rows = []
    for task, by_mask in losses.items():
        for mask, found in by_mask.items():
            difference, error = paired_difference(found, by_mask[BASE])
            row = {"task": task, "mask": mask, "loss": found.loss, "difference": difference, "error": error}
            rows.append(row | {"tokens": int(found.tokens.sum()), "documents": len(found.documents)})
    return rows


def merge_all(
    bank: MaskBank, losses: Mapping[str, Mapping[str, Evaluation]], splits: Mapping[str, Splits], tokenizer, root: Path
) -> tuple[float, dict[str, int]]:
    """Return (largest loss difference between a merged model and the bank on its task, bytes on disk and in memory)."""
    apart, sizes = 0.0, dict.fromkeys(("merged models on disk", "masks on disk", "merged models in memory"), 0)
    for task in TASKS:
        model, _ = load_model(MODEL)
        merge_model(load_masks(model, root / task))
        loss = evaluate(model, splits[task].validation, batch_size=4).loss
        apart = max(apart, abs(loss - losses[task][task].loss))
        saved = save_model(model, tokenizer, root / "merged" / task)
        sizes["merged models on disk"] += (saved / "model.safetensors").stat().st_size
        sizes["masks on disk"] += sum(path.stat().st_size for path in (root / task).iterdir())
        sizes["merged models in memory"] += tensor_bytes(model)
    return apart, sizes


def bytes_of(bank: MaskBank) -> dict[str, int]:
    """Return bytes measured from the tensors, and bytes computed from the shapes."""
    layers = [module for module in bank.model.modules() if hasattr(module, "masks")]
    computed = sum(len(m.masks) * m.out_features * -(-m.in_features // 32) * 4 for m in layers)
    return {
        "base in memory": tensor_bytes(bank.model),
        "masks in memory": sum(bank.nbytes().values()),
        "masks in memory, computed": computed,
    }


def tensor_bytes(model: nn.Module) -> int:
    """Return the bytes of parameters and buffers, each counted once."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def bank_of_all_layers(root: Path) -> MaskBank:
    """Return a bank with random masks on every linear of every layer."""
    masks = write_masks(root / "all", MODEL, list(TASKS), "bfloat16", keep_ratio=0.9)
    return load_mask_bank(load_model(MODEL)[0], masks)
