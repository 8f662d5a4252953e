"""Tokens per second of vLLM with masks: python -m benchmarks.in_vllm BASE, in vLLM's environment (docs/how-to/vllm.md).

BASE is a directory of a model; each task drops 3 % of the weights of all its linear layers. Each figure is the best of
nine generations of 32 tokens per row, eager, in the model's dtype. The kinds run in three turns, each time in a process
of their own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mft_kernels import backend_report

TASKS = ("a", "b", "c", "d")
ROWS = (8, 32)
TOKENS, TIMES, ROUNDS, SHARE = 32, 3, 3, 0.03
OPTIONS: dict[str, Any] = {"enforce_eager": True, "max_model_len": 1024, "enable_prefix_caching": False}
KINDS = {
    "plain": "vLLM without masks",
    "switching": "a task by mft.vllm.use",
    "one": "per request, all rows of one task",
    "mixed": "per request, rows of 4 tasks in turn",
    "base": "per request, rows without a task",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--tasks", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kind:
        print("\n" + json.dumps(measured(args.kind, args.base, args.tasks)))
        return
    best = {kind: [0.0] * len(ROWS) for kind in KINDS}
    with tempfile.TemporaryDirectory() as root:
        save_tasks(args.base, Path(root))
        for kind in [*KINDS] * ROUNDS:
            command = [sys.executable, "-m", "benchmarks.in_vllm", args.base, "--kind", kind, "--tasks", root]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rates = json.loads([line for line in done.stdout.splitlines() if line.startswith("[")][-1])
            best[kind] = [max(pair) for pair in zip(best[kind], rates, strict=True)]
    print(f"masks by the backend {backend_report()['auto']['cpu']}\n")
    print("| tokens/s, higher is better | " + " | ".join(f"{rows} rows" for rows in ROWS) + " |")
    print("|---|" + "---:|" * len(ROWS))
    for kind, words in KINDS.items():
        print(f"| {words} | " + " | ".join(f"{rate:.1f}" for rate in best[kind]) + " |")


def save_tasks(base: str, root: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from mft.config import MaskConfig
    from mft.masks.convert import mask_model, masked_modules
    from mft.masks.export import save_masks

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    masked = mask_model(model, MaskConfig(keep_ratio=1 - SHARE))
    for seed, task in enumerate(TASKS):
        generator = torch.Generator().manual_seed(seed)
        for layer in masked_modules(masked).values():
            layer.scores.data = torch.rand(layer.scores.shape, generator=generator) + 0.1
        save_masks(masked, root / task)


def measured(kind: str, base: str, root: Path) -> list[float]:
    """Return the tokens per second for each number of rows."""
    from vllm import LLM, SamplingParams

    import mft.vllm

    tasks = {task: root / task for task in TASKS}
    names: list[str | None] = {"one": ["a"], "mixed": list(TASKS)}.get(kind, [None])
    requests = None
    if kind == "plain":
        llm = LLM(model=base, **OPTIONS)
    else:
        llm = mft.vllm.load(base, tasks, per_request=kind != "switching", **OPTIONS)
    if kind == "switching":
        mft.vllm.use(llm, "a")
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    rates = []
    for rows in ROWS:
        prompts = [f"Q: What is {row} + 5?\nA:" for row in range(rows)]
        if kind in ("one", "mixed", "base"):
            requests = [mft.vllm.request_of(llm, names[row % len(names)]) for row in range(rows)]
        seconds = []
        for _ in range(TIMES + 1):  # the first warms up
            begin = time.perf_counter()
            llm.generate(prompts, sampling, use_tqdm=False, lora_request=requests)
            seconds.append(time.perf_counter() - begin)
        rates.append(rows * TOKENS / min(seconds[1:]))
    return rates


if __name__ == "__main__":
    main()
