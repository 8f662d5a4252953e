"""Find how much memory a training step takes: python -m benchmarks.memory [cards | blocks] ...

cards   LLaMA2-7B and others on cards that we do not have: estimated, and simulated on fake tensors (2 minutes)
blocks  two layers of LLaMA2-7B's shape, measured: each way, the paper's formulation, eager PyTorch (10 minutes)

Each writes a record memory_<name> into benchmarks/results.
"""

import sys

import torch

from benchmarks.memory.simulated_step import simulate_step
from mft.memory.estimate import estimate
from mft.memory.shapes import known_config, shape_from_config
from mft.memory.workload import Workload

from ..bench_train_step import ACCUMULATION, started
from ..harness import RESULTS, ROOT, THREADS, Finding, Spread, environment, report
from ..training_steps import EAGER, OURS, PAPER, workload_of
from .rival_loops import RIVALS, simulate_rival

MODEL = "llama2-7b"
LAYERS, TOKENS = 2, 512  # of the question blocks
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

    def add(name: str, peak: int, rule: str | None = None, bound: float | None = None) -> None:
        findings.append(Finding(name, Spread.of([peak / 1e9]), "GB", rule, bound))
        print(f"{name}: {peak / 1e9:.2f} GB", flush=True)

    for (model, way, layers, quantization, quantize_masked), bound in TARGETS.items():
        workload = Workload(way, layers, accumulation=2, quantization=quantization, quantize_masked=quantize_masked)
        name = f"{model}, {way}, {'all layers' if layers is None else '4 layers'}"
        config = known_config(model)
        add(f"{name}: estimated", estimate(shape_from_config(config), workload).device_peak, "at most", bound)
        add(f"{name}: simulated", simulate_step(config, workload).device_peak, "at most", bound)
    for layers in (LOCAL, None):
        for rival in RIVALS.values():
            workload = Workload("plain", layers, accumulation=2)
            name = f"{MODEL}, {rival.name}, {'all layers' if layers is None else '4 layers'}: simulated"
            add(name, simulate_rival(rival, known_config(MODEL), workload).device_peak)
    report("memory_cards", "Peak on the device, sequence 4096, micro-batch 1; not measured on a GPU", findings)


def blocks() -> None:
    """Measure peaks, each in its own process, and compare them with mft estimate."""
    config = known_config(MODEL) | {"num_hidden_layers": LAYERS}
    shape = shape_from_config(config)
    # glibc then returns freed memory at once, so resident memory equals allocated memory
    variables = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    findings, breakdown = [], {}
    for competitor in (*OURS, PAPER, EAGER):
        name = competitor.removeprefix("ours, ")
        with started(competitor, config, TOKENS, variables) as worker:
            seconds, peak = worker.ask("step"), Spread.of([worker.ask("peak") / 1e9])
        if competitor in OURS:
            estimated = estimate(shape, workload_of(name, TOKENS, ACCUMULATION, "cpu"))
            breakdown[name] = estimated.device
            findings.append(Finding(f"{name}: measured", peak, "GB", "at most", estimated.device_peak / 1e9))
            findings.append(Finding(f"{name}: estimated", Spread.of([estimated.device_peak / 1e9]), "GB"))
        else:
            findings.append(Finding(f"{name}: measured", peak, "GB"))
        findings.append(Finding(f"{name}: time a step", Spread.of([seconds]), "s"))
        print(f"{name}: {peak} GB, {seconds:.1f} s a step", flush=True)
    title = f"{LAYERS} layers of {MODEL}'s shape, all masked, bf16, {ACCUMULATION} x {TOKENS} tokens a step, cpu"
    report("memory_blocks", title, findings, estimated_bytes=breakdown)


QUESTIONS = {"cards": cards, "blocks": blocks}


def main() -> None:
    """Answer all questions, or those named."""
    asked = sys.argv[1:] or list(QUESTIONS)
    unknown = [question for question in asked if question not in QUESTIONS]
    if unknown:
        sys.exit(f"questions must be among {', '.join(QUESTIONS)}, got {', '.join(unknown)}")
    torch.set_num_threads(THREADS)
    print("\n".join(f"{key}: {value}" for key, value in environment().items()))
    for question in asked:
        QUESTIONS[question]()
    print(f"\nwritten to {RESULTS.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
