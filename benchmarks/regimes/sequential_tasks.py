"""Learn five tasks one after the other, and measure what each way of learning still knows of the first at the end.

    python -m benchmarks.regimes.sequential_tasks [--out runs/sequential-tasks]     an estimated hour on two cores
    python -m benchmarks.regimes.sequential_tasks --quick                           minutes; not for the record

A small Llama, trained from scratch on Python's library, learns C++ headers, problems with exact answers, numpy's
docstrings, sympy and transformers. Seed s begins with task s and rotates, so that with as many seeds as tasks each task
is once at every place. After each task the test loss of every task is measured.

    control                    the weights, trained on
    control, 0.8 of the way    after each task, start + 0.8 (end - start)
    LoRA merged                an adapter, merged into the weights after each task
    mask on mask               a mask per task, on what the earlier masks left
    mask trained on            one mask, whose scores are trained on: dropped weights may come back
    masks united               a mask per task from the base, then what all of them keep
    LoRAs added                an adapter per task from the base, then the sum of all
    a mask per task            the same masks, each task under its own: the task of a text must be known
    a LoRA per task            the same with adapters
    joint                      the weights, on all tasks at once: a bound

All change the linears of all layers, with the same steps. Validation chooses each arm's rate with the first seed, by
the mean loss of the five tasks at the end.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from mft.config import DataConfig, TrainConfig
from mft.evaluation.evaluate import evaluate
from mft_study.evidence.power import Spread

from ..tables import markdown
from .arms import Way, control_arm, ground_of, lora_arm, mask_arm
from .findings import ROWS, Documents, compare_arms, interval, minus, nats_of
from .learners import AdaptersAdded, MasksUnited, OneOnAnother, PerTask, TrainedOn
from .runs import CHOICE, SECONDS, Found, Regime, Run, best_rate, chosen_runs, load_base, quick_scratch, run_command
from .texts import docstrings_of, sources_of, write_texts

ORDER, NATS = "order", "nats"  # keys of a run's result
END, LEARNED, FORGOTTEN = "loss at the end", "just learned", "forgotten"
REFERENCE = "control"  # the arm that all others are compared with
MASKS, LORAS = "a mask per task", "a LoRA per task"
BOUND = "joint"  # all tasks at once


_WEIGHT_RATES, _ADAPTER_RATES, _SCORE_RATES = [1e-3, 2e-3, 4e-3], [4e-3, 8e-3, 1.6e-2], [4e-3, 8e-3, 1.6e-2]
WAYS = {
    REFERENCE: Way(control_arm, OneOnAnother, _WEIGHT_RATES),
    "control, 0.8 of the way": Way(control_arm, functools.partial(OneOnAnother, alpha=0.8), _WEIGHT_RATES),
    "LoRA merged": Way(lora_arm, OneOnAnother, _ADAPTER_RATES),
    "mask on mask": Way(mask_arm, OneOnAnother, _SCORE_RATES),
    "mask trained on": Way(mask_arm, TrainedOn, _SCORE_RATES),
    "masks united": Way(mask_arm, MasksUnited, _SCORE_RATES),
    "LoRAs added": Way(lora_arm, AdaptersAdded, _ADAPTER_RATES),
    MASKS: Way(mask_arm, PerTask, _SCORE_RATES),
    LORAS: Way(lora_arm, PerTask, _ADAPTER_RATES),
    BOUND: Way(control_arm, OneOnAnother, _WEIGHT_RATES),
}


def _train() -> TrainConfig:
    return TrainConfig(epochs=2.0, batch_size=4, warmup_ratio=0.05, betas=(0, 0.99))


@dataclass(frozen=True)
class SequentialTasks(Regime):
    """The regime over the ways that rates names."""

    tasks: dict[str, DataConfig] = field(default_factory=dict)
    train: TrainConfig = field(default_factory=_train)  # for one task; the rate is the run's

    assumed = Spread(0.1, 0.4, "a smaller model")

    def order(self, seed: int) -> list[str]:
        """Return the order in which a seed learns the tasks."""
        tasks = list(self.tasks)
        first = seed % len(tasks)
        return [*tasks[first:], *tasks[:first]]

    def texts(self) -> dict[str, DataConfig]:
        return self.tasks

    def run(self, base: Path, run: Run) -> Found:
        """Return NATS: by task, each test document's nats before the first stage and after each; ORDER of the tasks."""
        model, tokenizer = load_base(base)
        splits, order, way = self.splits(tokenizer, run.seed), self.order(run.seed), WAYS[run.arm]
        arm = way.arm(lrs=self.rates[run.arm])
        train = dataclasses.replace(self.train, lr=run.lr, seed=run.seed)
        learner = way.method(arm, ground_of(model, arm, run), train)
        nats: dict[str, list[list[float]]] = {task: [] for task in order}
        for learned in [[], *([order] if run.arm == BOUND else [[task] for task in order])]:
            if learned:
                learner.learn(learned[0], datasets.concatenate_datasets([splits[task].train for task in learned]))
            for task in order:
                nats[task].append(nats_of(learner.model(task), splits[task].test))
        validation = [evaluate(learner.model(task), splits[task].validation, batch_size=ROWS).loss for task in order]
        return {CHOICE: float(np.mean(validation)), ORDER: order, NATS: nats}

    def arms(self, found: dict[Run, Found], documents: Documents) -> dict[str, Any]:
        """Return the mean loss of all tasks at the end, of each when just learned, and what was forgotten since."""
        runs = {arm: chosen_runs(self, found, arm) for arm in self.rates}
        arms: dict[str, Any] = {
            arm: {"lr": best_rate(self, found, arm), SECONDS: float(np.mean([one[SECONDS] for one in own.values()]))}
            for arm, own in runs.items()
        }
        for measure, nats_in in _MEASURES.items():
            nats = {arm: {seed: nats_in(one) for seed, one in own.items()} for arm, own in runs.items()}
            nats = {arm: by_seed for arm, by_seed in nats.items() if all(by_seed.values())}
            differences = compare_arms(nats, REFERENCE, documents)
            for arm, by_seed in nats.items():
                arms[arm][measure] = float(np.mean([documents.mean_loss(one) for one in by_seed.values()]))
                arms[arm][f"{measure} - {REFERENCE}"] = differences.get(arm)
        if {MASKS, LORAS} <= runs.keys():
            nats = {arm: {seed: final_nats(one) for seed, one in runs[arm].items()} for arm in (MASKS, LORAS)}
            arms[MASKS][f"{END} - {LORAS}"] = compare_arms(nats, LORAS, documents)[MASKS]
        for arm, own in runs.items():
            if LEARNED in arms[arm]:
                arms[arm]["matrix"] = matrix(list(own.values()), documents)
        return arms

    def table(self, arms: dict[str, Any]) -> str:
        less = f"- {REFERENCE}"
        rows = []
        for arm, one in sorted(arms.items(), key=lambda item: item[1][END]):
            learned, lost = (f"{one[name]:.3f}" if name in one else "" for name in (LEARNED, FORGOTTEN))
            intervals = [interval(one.get(f"{name} {less}")) for name in (END, FORGOTTEN)]
            columns = [f"{one[END]:.3f}", intervals[0], learned, lost, intervals[1], f"{one[SECONDS]:.0f}"]
            rows.append([arm, f"{one['lr']:g}", *columns])
        parts = [
            f"# {len(self.tasks)} tasks, one after the other",
            f"Mean test loss over {', '.join(self.tasks)}, nats per token; {len(self.seeds)} seeds; 95 % intervals; * "
            "where p < 0.05 after Holm's correction over the arms. *Forgotten*: the loss of a task at the end less "
            "that just after it was learned, mean over all tasks; nothing of the last one.",
            markdown(["arm", "rate", END, less, LEARNED, FORGOTTEN, less, "s per run"], rows),
        ]
        if against := arms.get(MASKS, {}).get(f"{END} - {LORAS}"):
            parts.append(f"{MASKS} less {LORAS}: {interval(against)}")
        places = [str(place) for place in range(1, len(self.tasks) + 1)]
        for arm, one in arms.items():
            if "matrix" in one:
                losses = [[str(k), *(f"{loss:.3f}" for loss in row)] for k, row in enumerate(one["matrix"])]
                told = markdown(["tasks learned", *places], losses)
                parts.append(f"**{arm}**: loss of the task at each place\n\n{told}")
        return "\n\n".join(parts)


def matrix(runs: Sequence[Found], documents: Documents) -> list[list[float]]:
    """Return [k][j]: loss of the j-th learned task after k tasks, averaged over seeds; k = 0 is the base."""
    losses = []
    for one in runs:
        by_task = [[sum(nats) / sum(documents.tokens[task]) for nats in one[NATS][task]] for task in one[ORDER]]
        losses.append(np.array(by_task).T)
    return np.mean(losses, axis=0).round(4).tolist()


def final_nats(one: Found) -> dict[str, list[float]]:
    return {task: nats[-1] for task, nats in one[NATS].items()}


def just_learned(one: Found) -> dict[str, list[float]]:
    """Return the loss of each task just after it was learned; empty if tasks were learned at once."""
    if len(one[NATS][one[ORDER][0]]) <= len(one[ORDER]):
        return {}
    return {task: one[NATS][task][place] for place, task in enumerate(one[ORDER], start=1)}


def forgotten(one: Found) -> dict[str, list[float]]:
    """Return the loss increase since each task was learned, 0 for the last; empty if tasks were learned at once."""
    before, after = just_learned(one), final_nats(one)
    return minus({task: after[task] for task in before}, before)


_MEASURES = {END: final_nats, LEARNED: just_learned, FORGOTTEN: forgotten}


# ---------------------------------------------------------------------------------------------- the command


def default_tasks(directory: Path, train_tokens: int, eval_tokens: int) -> dict[str, DataConfig]:
    """Return the five tasks. Three are texts of installed packages, written into directory if they are missing."""
    texts = {
        "docstrings": lambda: docstrings_of("numpy"),
        "sympy": lambda: sources_of("sympy"),
        "transformers": lambda: sources_of("transformers"),
    }
    sources = {"headers": "headers", "problems": "problems"}
    for name, read in texts.items():
        path = directory / f"{name}.jsonl"
        sources[name] = str(path if path.is_file() else write_texts(path, read()))
    return {
        name: DataConfig(source=source, sequence_length=256, max_train_tokens=train_tokens, max_eval_tokens=eval_tokens)
        for name, source in sources.items()
    }


def declare(texts: Path, *, quick: bool) -> SequentialTasks:
    """Declare the regime; quick: a tenth of the work, two seeds, two rates. texts: folder for the tasks' files."""
    if quick:
        rates, tasks = {arm: way.rates[:2] for arm, way in WAYS.items()}, default_tasks(texts, 8_192, 4_096)
        return SequentialTasks(rates=rates, seeds=[0, 1], scratch=quick_scratch(), extensions=0, tasks=tasks)
    rates, tasks = {arm: way.rates for arm, way in WAYS.items()}, default_tasks(texts, 32_768, 8_192)
    return SequentialTasks(rates=rates, seeds=[0, 1, 2, 3, 4], tasks=tasks)


if __name__ == "__main__":
    run_command(__doc__, "sequential_tasks", declare)
