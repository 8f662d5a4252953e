"""Run benchmarks of EleutherAI's lm-evaluation-harness on a loaded model, masked or not, without a merge or a copy."""

import importlib.metadata
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Column, Table
from torch import nn

from mft.checks import check_rule, install_command, nearest, nearest_path
from mft.models.longrope import refuse_long_batches, switch_length

# lm_eval is imported inside the functions: it takes seconds, and only benchmarks need it.

_ALLOW_CODE = "HF_ALLOW_CODE_EVAL"  # environment variable that the metric of code tasks requires before it runs code


_SHOWN = 5  # number of files that a message lists


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task, or of a group of tasks."""

    task: str
    metric: str  # with the answers' filter after a comma, unless the filter is "none"
    value: float
    stderr: float | None
    samples: int | None  # number of counted documents; None if the harness does not report it


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks that exist and whose data are loaded. manager: lm-eval's TaskManager."""

    names: list[str]
    manager: Any
    run_code: bool


def load_tasks(
    names: Sequence[str], *, tasks_dir: Path | None = None, run_task_code: bool = False, run_code: bool = False
) -> LoadedTasks:
    """Find tasks, groups or tags by name and load their data, so that missing ones are found before a model runs.

    Args:
        tasks_dir: A directory of the user's own task files (*.yaml). They override lm-eval's tasks of the same name.
        run_task_code: Allow these files to run code: !function, templates and metrics can run any Python.
        run_code: Allow tasks such as humaneval to run code that the model wrote, on this machine.
    Raises: ValueError for an unknown task, for code without permission to run, or if data cannot be loaded;
        RuntimeError without lm-eval.
    """
    names = list(dict.fromkeys(names))
    check_rule(bool(names) and all(names), "--lm-eval", "be names of tasks with commas between them", ",".join(names))
    if tasks_dir is not None and not tasks_dir.is_dir():
        raise ValueError(f"--lm-eval-tasks must be a directory of task files, got {tasks_dir}{nearest_path(tasks_dir)}")
    if tasks_dir is not None and not run_task_code:
        raise ValueError(
            f"--lm-eval-tasks must come with --run-task-code, got {tasks_dir} alone: task files are programs, "
            f"{_programs(tasks_dir)} would run on this machine: pass it if you trust whoever wrote them"
        )
    manager = _find_tasks(names, tasks_dir)
    if run_code:
        os.environ[_ALLOW_CODE] = "1"
    for name in names:
        try:
            loaded = manager.load([name])
        except (OSError, ImportError, ValueError) as error:
            if _ALLOW_CODE in str(error):
                raise _runs_code(name) from None
            reason = str(error).strip().split("\n")[0]
            raise ValueError(
                f"lm-eval's task {name} must be loadable, got {type(error).__name__}: {reason}. Its data come from the "
                "network on the first use; --lm-eval-tasks takes a directory of tasks on local files"
            ) from None
        if not run_code and any(getattr(task, "UNSAFE_CODE", False) for task in loaded["tasks"].values()):
            raise _runs_code(name)
    return LoadedTasks(names, manager, run_code)


def score_tasks(
    model: nn.Module, tokenizer: Any, tasks: LoadedTasks, *, limit: int | None = None, batch_size: int | None = None
) -> list[TaskScore]:
    """Evaluate model as it is now, with its present masks, by lm-eval. Log-probabilities are fp32.

    Args:
        limit: Number of documents of each task, for a trial run; the result is then not meaningful. None: all.
        batch_size: Rows per batch; None: 4, or 1 if frequencies depend on the longest row (see longrope.py).
    Raises: ValueError if a batch of such a model has several rows beyond the length at which frequencies change.
    """
    if batch_size is None:
        batch_size = 4 if switch_length(model) is None else 1
    check_rule(limit is None or limit >= 1, "--limit", "be at least 1", limit)
    lm_eval = _import_lm_eval()
    from lm_eval.models.huggingface import HFLM

    was_training = model.training
    logger = logging.getLogger("lm_eval")
    level = logger.level
    handle = refuse_long_batches(model)
    logger.setLevel(logging.ERROR)  # it warns about every model that is passed as an object
    try:
        runner = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype=torch.float32)
        found = lm_eval.simple_evaluate(
            runner,
            tasks=tasks.names,
            task_manager=tasks.manager,
            limit=limit,
            log_samples=False,
            confirm_run_unsafe_code=tasks.run_code,
        )
    finally:
        handle.remove()
        logger.setLevel(level)
        model.train(was_training)
    return [score for name, result in found["results"].items() for score in _scores(name, result, found["n-samples"])]


def task_table(results: Mapping[str, Sequence[TaskScore]]) -> Table:
    """Return a table with one row per metric and one column per model. results: by the model's name."""
    table = Table(
        Column("task", overflow="fold"), "metric", *(Column(name, justify="right", overflow="fold") for name in results)
    )
    columns = [{(score.task, score.metric): score for score in scores} for scores in results.values()]
    for task, metric in columns[0]:
        table.add_row(task, metric, *(_score_text(column.get((task, metric))) for column in columns))
    return table


def write_scores(path: Path, results: Mapping[str, Sequence[TaskScore]], limit: int | None) -> None:
    """Write the results as JSON, with lm-eval's version and the limit."""
    content = {
        "lm_eval": importlib.metadata.version("lm_eval"),
        "limit": limit,
        "results": {name: [asdict(score) for score in scores] for name, scores in results.items()},
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------- private


def _import_lm_eval() -> Any:
    try:
        import lm_eval
    except ImportError:
        raise RuntimeError(f"--lm-eval needs lm-eval, which is not installed: {install_command('lm-eval')}") from None
    return lm_eval


def _find_tasks(names: list[str], tasks_dir: Path | None) -> Any:
    """Return a TaskManager that knows all names."""
    _import_lm_eval()
    from lm_eval.tasks import TaskManager

    if tasks_dir is not None:
        # Try these files alone first: reading lm-eval's own 14,684 tasks takes 17 s on one core.
        own = TaskManager(include_path=str(tasks_dir), include_defaults=False)
        if set(names) <= set(own.all_tasks):
            return own
    manager = TaskManager(include_path=None if tasks_dir is None else str(tasks_dir))
    for name in names:
        if name not in manager.task_index:
            close = nearest(name, manager.all_tasks)
            raise ValueError(
                f"--lm-eval must name tasks of lm-eval{'' if tasks_dir is None else f' or of {tasks_dir}'}, "
                f"got {name!r}{close or '; lm_eval ls tasks lists them'}"
            )
    return manager


def _programs(tasks_dir: Path) -> str:
    """Return the files from which lm-eval may run code: all task files, because templates are unrestricted Jinja."""
    names = [
        str(path.relative_to(tasks_dir)) for kind in ("py", "yaml") for path in sorted(tasks_dir.rglob(f"*.{kind}"))
    ]
    more = len(names) - _SHOWN
    return (", ".join(names[:_SHOWN]) or "any file put there") + (f" and {more} more" if more > 0 else "")


def _runs_code(name: str) -> ValueError:
    return ValueError(
        f"lm-eval's task {name} runs code that the model wrote, on this machine: pass --run-generated-code to allow "
        "it, preferably in a container"
    )


def _scores(name: str, result: dict[str, Any], samples: dict[str, dict[str, int]]) -> list[TaskScore]:
    """Return the scores in lm-eval's result, {"acc,none": 0.3, "acc_stderr,none": 0.1, ...}."""
    scores = []
    for key, value in result.items():
        metric, comma, answers = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        stderr = result.get(f"{metric}_stderr,{answers}")
        scores.append(
            TaskScore(
                task=name,
                metric=metric if answers == "none" else key,
                value=float(value),
                stderr=stderr if isinstance(stderr, float) else None,  # "N/A" if there is none
                samples=samples.get(name, {}).get("effective"),
            )
        )
    return scores


def _score_text(score: TaskScore | None) -> str:
    if score is None:
        return ""
    return f"{score.value:.4f}" + ("" if score.stderr is None else f" ± {score.stderr:.4f}")
