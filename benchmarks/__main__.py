"""Answer every question, or those named: python -m benchmarks [--quick] [--out FOLDER] [ops | train_step | ...] ..."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from . import (
    bench_cpu,
    bench_decode,
    bench_experts,
    bench_generate,
    bench_launch,
    bench_many_masks,
    bench_memory,
    bench_ops,
    bench_paths,
    bench_scaling,
    bench_score_optimiser,
    bench_train_step,
    pooled,
)
from .harness import RESULTS, ROOT, THREADS, environment, threads_of, write_results_to
from .plots import draw_ops, draw_scaling, draw_train_step
from .side_by_side import OURS, SideBySide

# question: the function that answers it; its argument says whether to be quick
QUESTIONS: dict[str, Callable[[bool], None]] = {
    "ops": bench_ops.main,
    "cpu": bench_cpu.main,
    "paths": bench_paths.main,
    "small_paths": bench_paths.main_small,
    "generate": bench_generate.main,
    "decode": bench_decode.main,
    "experts": bench_experts.main,
    "launch": bench_launch.main,
    "train_step": bench_train_step.main,
    "scaling": bench_scaling.main,
    "memory": lambda quick: bench_memory.main(),
    "score_optimiser": lambda quick: bench_score_optimiser.main(),
    "many_masks": lambda quick: bench_many_masks.main(),
}
# Questions that several processes answer together, and the function that shows the answer. They can also be quick.
POOLED: dict[str, Callable[[Path], None]] = {
    "ops": draw_ops,
    "cpu": bench_cpu.conclude,
    "paths": lambda path: None,
    "small_paths": lambda path: None,
    "generate": bench_generate.conclude,
    "decode": bench_decode.conclude,
    "experts": bench_experts.conclude,
    "launch": bench_launch.conclude,
    "train_step": draw_train_step,
    "scaling": draw_scaling,
}
# How the records of several processes are joined if they are not pooled.
JOINED: dict[str, Callable[[Sequence], dict]] = {"paths": bench_paths.joined, "small_paths": bench_paths.joined}
# Questions that measure backends side by side; the others measure only ours.
SIDE_BY_SIDE = ("ops", "cpu")
QUICK_RESULTS = ROOT / "build" / "benchmarks"


def main() -> None:
    """Answer the questions and print where the answers are."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("questions", nargs="*", help=f"among {', '.join(QUESTIONS)}; all unless given")
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds: minutes; not for the record")
    parser.add_argument("--alone", action="store_true", help="measure in this process; not for the record")
    parser.add_argument(
        "--out", type=Path, help="folder of the results (benchmarks/results; build/benchmarks if quick)"
    )
    parser.add_argument("--threads", type=int, default=THREADS, help=f"{THREADS} unless given")
    asked = parser.parse_args()
    unknown = [question for question in asked.questions if question not in QUESTIONS]
    if unknown:
        parser.error(f"questions must be among {', '.join(QUESTIONS)}, got {', '.join(unknown)}")
    others = [name for name in SideBySide.here().asked if name != OURS]
    questions = asked.questions or (POOLED if asked.quick else QUESTIONS)
    if others and (alone := [question for question in questions if question not in SIDE_BY_SIDE]):
        parser.error(
            f"questions must be among {', '.join(SIDE_BY_SIDE)} to measure {', '.join(others)} beside ours, got "
            f"{', '.join(alone)}; name one of these, or unset MFT_KERNELS"
        )
    folder = (asked.out or (QUICK_RESULTS if asked.quick else RESULTS)).resolve()
    write_results_to(folder)
    torch.set_num_threads(asked.threads)
    print("\n".join(f"{key}: {value}" for key, value in environment().items()))
    for question in questions:
        threads = threads_of(question, asked.threads)
        torch.set_num_threads(threads)
        if question in POOLED and not (asked.quick or asked.alone):
            POOLED[question](pooled.answer(question, folder, threads, JOINED.get(question, pooled.pooled)))
        else:
            QUESTIONS[question](asked.quick)
    print(f"\nwritten to {folder}")


main()
