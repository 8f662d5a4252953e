"""Answer questions about speed and memory; the answers go to benchmarks/results, rows to fit costs to into runs/paths.

python -m benchmarks cpu                                                 one question
python -m benchmarks cpu --case "step, bf16, 4096 x 4096, M = 64"        one row of its table
python -m benchmarks ops train_step --quick                              two questions, few cases
"""

import argparse
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple


class Question(NamedTuple):
    """The module that answers, what it asks, and functions of the module by name: its import takes seconds."""

    module: str
    asks: str
    alone: bool = False  # whether one process answers, and never quickly
    main: str = "main"
    joins: str | None = None  # what joins several records, if they are not pooled
    cases: bool = False  # whether --case can choose among its rows
    fitted: bool = False  # whether costs are fitted to its rows, which then go to runs/paths

    def function(self, name: str) -> Callable[..., Any]:
        return getattr(import_module(f"{__package__}.{self.module}"), name)


QUESTIONS = {
    "cpu": Question("bench_cpu", "Is the mask free on this processor? (minutes)", cases=True),
    "ops": Question("bench_ops", "What does each op cost, next to a dense layer? (half an hour)", cases=True),
    "experts": Question("bench_experts", "Are masks free on a mixture's experts?", cases=True),
    "loop": Question("bench_loop", "What does a layer's step cost with its optimiser?", cases=True),
    "train_step": Question("bench_train_step", "What does a whole step cost? (16 GB of memory)"),
    "scaling": Question("bench_scaling", "How does a step grow with tokens, width, layers, threads?"),
    "memory": Question("bench_memory", "How much memory does the step of one layer need?", alone=True),
    "generate": Question("bench_generate", "Does a masked model generate as fast as a dense one?"),
    "serve": Question("bench_serve", "How fast is mft serve, beside plain generate of the base? (9 minutes)"),
    "many_masks": Question("bench_many_masks", "What do three tasks' masks on one base give and cost?", alone=True),
    "launch": Question("bench_launch", "What does a call cost, beyond nn.Linear? (a minute)"),
    "paths": Question(
        "bench_paths", "Which path is fastest for large layers? (half an hour)", joins="joined", fitted=True
    ),
    "small_paths": Question(
        "bench_paths", "The same for small layers (90 s)", main="main_small", joins="joined", fitted=True
    ),
}
WITH_CASES = [name for name, question in QUESTIONS.items() if question.cases]
SIDE_BY_SIDE = ("ops", "cpu")  # questions that measure backends side by side; the others measure only ours


def main() -> None:
    """Answer the questions and print where the answers are."""
    parser = _parser()
    asked = parser.parse_args()
    if unknown := [name for name in asked.questions if name not in QUESTIONS]:
        parser.error(f"questions must be among {', '.join(QUESTIONS)}, got {', '.join(unknown)}")
    if asked.case is not None and (len(asked.questions) != 1 or asked.questions[0] not in WITH_CASES):
        parser.error(f"--case needs one question among {', '.join(WITH_CASES)}, got {' '.join(asked.questions)}")
    # torch and others, which take seconds, are imported when it is known that they are needed
    import torch

    from . import pooled
    from .harness import ROOT, THREADS, choose_cases, environment, threads_of, write_results_to
    from .records import RESULTS, TIMINGS
    from .side_by_side import OURS, SideBySide
    from .tables import show

    others = [name for name in SideBySide.here().asked if name != OURS]
    questions = asked.questions or [name for name, of in QUESTIONS.items() if not (of.alone and asked.quick)]
    if others and (alone := [question for question in questions if question not in SIDE_BY_SIDE]):
        parser.error(
            f"questions must be among {', '.join(SIDE_BY_SIDE)} to measure {', '.join(others)} beside ours, got "
            f"{', '.join(alone)}; name one of these, or unset MFT_KERNELS"
        )
    not_for_the_record = asked.quick or asked.case is not None
    if asked.case is not None:
        choose_cases(asked.case)
    many = asked.threads or THREADS
    torch.set_num_threads(many)
    print("\n".join(f"{key}: {value}" for key, value in environment().items()))
    for name in questions:
        question, threads = QUESTIONS[name], threads_of(name, many)
        stored = ROOT / "build" / "benchmarks" if not_for_the_record else TIMINGS if question.fitted else RESULTS
        folder = (asked.out or stored).resolve()
        write_results_to(folder)
        torch.set_num_threads(threads)
        if question.alone:
            question.function(question.main)()
        elif not_for_the_record or asked.alone:
            question.function(question.main)(asked.quick)
        else:
            together = pooled.pooled if question.joins is None else question.function(question.joins)
            show(name, {"": json.loads(pooled.answer(name, folder, threads, together).read_text())})
        print(f"\n{name}: written to {folder}")


def _parser() -> argparse.ArgumentParser:
    lines = "\n".join(f"  {name:16} {question.asks}" for name, question in QUESTIONS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        usage="%(prog)s [QUESTION ...] [--case CASE] [--quick] [--alone] [--out OUT] [--threads THREADS]",
        description=__doc__,
        epilog=f"questions, all unless given:\n{lines}\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help="of those below")
    parser.add_argument("--quick", action="store_true", help="few cases and rounds, in minutes; into build/benchmarks")
    parser.add_argument(
        "--case",
        help=f"one row of {', '.join(WITH_CASES)}, as docs/reference/measured.md names it; * stands for any text; "
        "into build/benchmarks",
    )
    parser.add_argument("--alone", action="store_true", help="measure in this process; not for the record")
    parser.add_argument("--out", type=Path, help="another folder for the results")
    parser.add_argument("--threads", type=int, help="as in the stored results unless given")
    return parser


if __name__ == "__main__":
    main()
