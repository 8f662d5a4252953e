"""Answers every question, or those named: python -m benchmarks [masked_linear | kept_threshold | ...] ..."""

import sys

import torch

from . import bench_kept_threshold, bench_masked_linear, bench_memory, bench_score_optimiser
from .harness import RESULTS, ROOT, THREADS, environment

QUESTIONS = {
    "masked_linear": bench_masked_linear.main,
    "kept_threshold": bench_kept_threshold.main,
    "memory": bench_memory.main,
    "score_optimiser": bench_score_optimiser.main,
}


def main() -> None:
    """Run the questions and say where the answers are."""
    asked = sys.argv[1:] or list(QUESTIONS)
    unknown = [question for question in asked if question not in QUESTIONS]
    if unknown:
        sys.exit(f"questions must be among {', '.join(QUESTIONS)}, got {', '.join(unknown)}")
    torch.set_num_threads(THREADS)
    print("\n".join(f"{key}: {value}" for key, value in environment().items()))
    for question in asked:
        QUESTIONS[question]()
    print(f"\nwritten to {RESULTS.relative_to(ROOT)}")


main()
