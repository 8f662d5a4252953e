"""Find how much memory a training step takes: python -m benchmarks.memory [cards | mixtures | smollm2 | blocks] ...

cards    LLaMA2-7B and others on cards that we do not have: estimated, and simulated on fake tensors (2 minutes)
mixtures gpt-oss-20b, qwen3-30b-a3b and mixtral-8x7b on cards of 12, 24 and 80 GB, likewise (10 minutes)
smollm2  SmolLM2-135M's real weights, every way of running: the same losses step by step (4 minutes)
blocks   two layers of LLaMA2-7B's shape, measured: each way, the paper's formulation, eager PyTorch (10 minutes)

Each writes a record memory_<name> into benchmarks/results. The plot of all is benchmarks/results/memory.png.
"""

import json
import os
import subprocess
import sys
import time

import torch

from benchmarks.memory.simulated_step import simulate_step
from mft.config import DataConfig, MaskConfig, ModelConfig, TrainConfig
from mft.data.splits import load_splits
from mft.masks.convert import mask_model
from mft.masks.quantize import quantize_model
from mft.memory.estimate import estimate
from mft.memory.shapes import known_config, shape_from_config
from mft.memory.workload import Workload
from mft.models.pretrained import load_model
from mft.training.loop import train_masks

from ..harness import RESULTS, ROOT, THREADS, Finding, Spread, environment, report
from . import mixtures, plot
from .rivals import RIVALS, simulate_rival
from .worker import MODEL, WAYS, workload_of

LAYERS, TOKENS, ACCUMULATION = 2, 512, 2  # of the question blocks
LOCAL = (4, 5, 6, 7)
# (model, way, masked layers, quantised base, whether masked layers are quantised): upper limit in GB on the device
TARGETS = {
    ("llama2-7b", "resident", LOCAL, None, False): 17.5,
    ("llama2-7b", "resident", None, None, False): 28,
    ("llama2-7b", "quantized", LOCAL, "nf4", False): 8,
    ("llama2-7b", "quantized", None, "nf4", True): 19,
    ("llama2-7b", "layerwise", LOCAL, None, False): 3.0,
    ("llama2-7b", "layerwise", None, None, False): 3.0,
    ("llama3.1-8b", "layerwise", LOCAL, None, False): 3.2,
    ("llama3.1-8b", "layerwise", None, None, False): 3.2,
    ("llama2-70b", "layerwise", LOCAL, "nf4", True): 6.5,
    ("llama2-70b", "layerwise", None, "nf4", True): 6.5,
}


def cards() -> None:
    """Estimate and simulate peaks on the device, sequence 4096, micro-batch 1, and compare them with the goals."""
    findings = []
    for (model, way, layers, quantization, quantize_masked), bound in TARGETS.items():
        workload = Workload(way, layers, accumulation=2, quantization=quantization, quantize_masked=quantize_masked)
        name = f"{model}, {way}, {'all layers' if layers is None else '4 layers'}"
        config = known_config(model)
        estimated = estimate(shape_from_config(config), workload).device_peak / 1e9
        simulated = simulate_step(config, workload).device_peak / 1e9
        findings.append(Finding(f"{name}: estimated", Spread.of([estimated]), "GB", "at most", bound))
        findings.append(Finding(f"{name}: simulated", Spread.of([simulated]), "GB", "at most", bound))
        print(f"{name}: {estimated:.2f} GB estimated, {simulated:.2f} GB simulated", flush=True)
    for layers in (LOCAL, None):
        for rival in RIVALS.values():
            workload = Workload("plain", layers, accumulation=2)
            peak = simulate_rival(rival, known_config(MODEL), workload).device_peak / 1e9
            name = f"{MODEL}, {rival.name}, {'all layers' if layers is None else '4 layers'}: simulated"
            findings.append(Finding(name, Spread.of([peak]), "GB"))
            print(f"{name}: {peak:.2f} GB", flush=True)
    report("memory_cards", "Peak on the device, sequence 4096, micro-batch 1; not measured on a GPU", findings)


def all_mixtures() -> None:
    """Estimate and simulate peaks of mixtures on device and host, sequence 4096, micro-batch 1."""
    findings = [finding for model in mixtures.MODELS for finding in mixtures.findings_of(model)]
    title = "Mixtures of experts, peaks in a step of 2 x 4096 tokens; simulated on fake tensors, not measured on a GPU"
    report("memory_mixtures", title, findings)


def smollm2() -> None:
    """Compare losses step by step, in fp32, so that only the order of sums differs."""
    runs: dict[str, list[float]] = {}
    seconds = {}
    for name, way, quantization in (
        *((way, way, None) for way in ("plain", "resident", "layerwise")),
        *((f"{way} on nf4", way, "nf4") for way in ("plain", "quantized", "layerwise")),
    ):
        model, tokenizer = load_model(ModelConfig("smollm2-135m", dtype="float32"))
        data = load_splits(DataConfig(sequence_length=256, max_train_tokens=8192, max_eval_tokens=2048), tokenizer)
        mask_model(model, MaskConfig(layers_to_transform="24-29", keep_ratio=0.99, init="magnitude"))
        if quantization is not None:
            quantize_model(model, quantization)
        begin = time.perf_counter()
        train = TrainConfig(lr=1e-3, steps=6, accumulation=4)
        runs[name] = [r.loss for r in train_masks(model, data.train, train, way=way, remember=False)]
        seconds[name] = (time.perf_counter() - begin) / train.steps
        print(f"{name:20} " + " ".join(f"{loss:.6f}" for loss in runs[name]) + f"  {seconds[name]:.1f} s", flush=True)
    findings = []
    for name, losses in runs.items():
        plain = runs["plain on nf4" if "nf4" in name else "plain"]
        apart = max(abs(a - b) for a, b in zip(losses, plain))
        findings.append(Finding(f"{name}: largest difference from plain", Spread.of([apart]), "nats", "at most", 1e-4))
        findings.append(Finding(f"{name}: time a step", Spread.of([seconds[name]]), "s"))
        findings += [Finding(f"{name}: loss of step {i}", Spread.of([v]), "nats") for i, v in enumerate(losses, 1)]
    report("memory_smollm2", "SmolLM2-135M, fp32, layers 24-29, 6 steps of 4 x 256 tokens", findings)


def blocks() -> None:
    """Measure peaks, each in its own process, and compare them with mft estimate."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = shape_from_config(known_config(MODEL) | {"num_hidden_layers": LAYERS})
    findings, breakdown = [], {}
    for name in (*WAYS, *RIVALS):
        measured = measure(name)
        peak = Spread.of([measured["peak_bytes"] / 1e9])
        if name in WAYS:
            estimated = estimate(shape, workload_of(name, TOKENS, ACCUMULATION, device))
            breakdown[name] = estimated.device
            findings.append(Finding(f"{name}: measured", peak, "GB", "at most", estimated.device_peak / 1e9))
            findings.append(Finding(f"{name}: estimated", Spread.of([estimated.device_peak / 1e9]), "GB"))
        else:
            findings.append(Finding(f"{name}: measured", peak, "GB"))
        findings.append(Finding(f"{name}: time a step", Spread.of([measured["seconds"]]), "s"))
        print(f"{name}: {peak} GB, {measured['seconds']:.1f} s a step, losses {measured['losses']}", flush=True)
    title = f"{LAYERS} layers of {MODEL}'s shape, all masked, bf16, {ACCUMULATION} x {TOKENS} tokens a step, {device}"
    path = report("memory_blocks", title, findings, device)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"estimated_bytes": breakdown}, indent=2) + "\n")


def measure(competitor: str) -> dict:
    """Return the worker's JSON. glibc returns freed memory at once, so resident memory equals allocated memory."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory.worker", competitor]
    command += [str(LAYERS), str(TOKENS), str(ACCUMULATION)]
    threshold = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    variables = os.environ | threshold | {"OMP_NUM_THREADS": str(THREADS)}
    run = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{competitor} failed: {run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


QUESTIONS = {"cards": cards, "mixtures": all_mixtures, "smollm2": smollm2, "blocks": blocks}


def main() -> None:
    """Answer all questions, or those named, and draw the stored results."""
    asked = sys.argv[1:] or list(QUESTIONS)
    unknown = [question for question in asked if question not in QUESTIONS]
    if unknown:
        sys.exit(f"questions must be among {', '.join(QUESTIONS)}, got {', '.join(unknown)}")
    torch.set_num_threads(THREADS)
    print("\n".join(f"{key}: {value}" for key, value in environment().items()))
    for question in asked:
        QUESTIONS[question]()
    plot.draw(RESULTS)
    print(f"\nwritten to {RESULTS.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
