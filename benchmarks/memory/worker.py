"""Run one competitor of benchmarks.memory in its own process: two optimiser steps and their peak memory.

    python -m benchmarks.memory.worker <competitor> <layers> <tokens> <accumulation>

Prints JSON: peak_bytes, seconds per step, losses. On a CPU the peak is resident memory beyond what the process held
before the model was made; on a GPU it is the allocator's.
"""

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from mft.config import MaskConfig, TrainConfig
from mft.engines.mode import MODES
from mft.masks.convert import mask_model
from mft.masks.quantize import quantize_model
from mft.memory.estimate import Workload
from mft.memory.shapes import known_config
from mft.training.loop import train_masks

from ..bench_memory import process_bytes
from .rivals import RIVALS, train_rival

MODEL = "llama2-7b"
STEPS = 2
# Compact scores and moments: 4 bytes per weight, compared with 12 in the paper.
COMPACT = {"scores": "int16", "moments": "8bit"}
# competitor: (way, quantised base, whether masked layers are quantised, storage of states)
WAYS = {
    "plain": ("plain", None, False, {"scores": "float32", "moments": "float32"}),
    "in_place": ("in_place", None, False, COMPACT),
    "resident": ("resident", None, False, COMPACT),
    "quantized": ("quantized", "nf4", True, COMPACT),
    "layerwise": ("layerwise", None, False, COMPACT),
}


def workload_of(competitor: str, tokens: int, accumulation: int, device: str) -> Workload:
    """Return the workload of mft estimate for a competitor that is one of our ways."""
    way, quantization, quantize_masked, states = WAYS[competitor]
    return Workload(
        memory=way,
        sequence=tokens,
        accumulation=accumulation,
        quantization=quantization,
        quantize_masked=quantize_masked,
        device=device,
        **states,
    )


def build(layers: int) -> Any:
    """Return a model with LLaMA2-7B's shapes, this number of layers, and random bf16 weights."""
    config = known_config(MODEL) | {"num_hidden_layers": layers}
    family = config.pop("model_type")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config), dtype=torch.bfloat16).eval()


class Rows:
    """Random tokens with the interface of a data set for batches.take_rows; memory does not depend on their values."""

    def __init__(self, model: Any, tokens: int, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._ids = torch.randint(0, model.config.vocab_size, (count, tokens), generator=generator)

    def __len__(self) -> int:
        return len(self._ids)

    def with_format(self, _: str) -> "Rows":
        return self

    def __getitem__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        return {"input_ids": self._ids[rows], "labels": self._ids[rows], "document": torch.tensor(rows)}


def train(competitor: str, model: Any, data: Rows, accumulation: int, device: str) -> list[float]:
    """Run two optimiser steps and return the loss of each."""
    workloads = TrainConfig(lr=1e-3, steps=STEPS, accumulation=accumulation)
    if competitor in RIVALS:
        return train_rival(RIVALS[competitor], model.to(device), data, workloads)
    way, quantization, quantize_masked, states = WAYS[competitor]
    workloads.moments = states["moments"]
    mask_model(model, MaskConfig.paper(scores_dtype=states["scores"]))
    if quantization is not None:
        quantize_model(model, quantization, masked=quantize_masked)
    MODES[way].move(model, device)
    reports = train_masks(model, data, workloads, way=way, device=device, remember=False)
    return [report.loss for report in reports]


def main(competitor: str, layers: int, tokens: int, accumulation: int) -> None:
    """Measure, after a step of a small model has loaded all code."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _warm_up(competitor, device)
    before = _start_measuring(device)
    model = build(layers)
    data = Rows(model, tokens, STEPS * accumulation)
    begin = time.perf_counter()
    losses = train(competitor, model, data, accumulation, device)
    seconds = (time.perf_counter() - begin) / STEPS
    print(json.dumps({"peak_bytes": _peak(device) - before, "seconds": seconds, "losses": losses}))


def _warm_up(competitor: str, device: str) -> None:
    config = known_config(MODEL) | {
        "num_hidden_layers": 2,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 512,
    }
    family = config.pop("model_type")
    model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config), dtype=torch.bfloat16)
    train(competitor, model.eval(), Rows(model, 64, STEPS), 1, device)


def _start_measuring(device: str) -> int:
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return process_bytes("VmRSS")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else process_bytes("VmHWM")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
