"""How a unit's model is evaluated: on a split of its domain, and on text that no arm is trained on."""

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from mft.evaluation.evaluate import evaluate
from mft.evaluation.exact_match import exact_matches
from mft.evaluation.kl_divergence import kl_divergence
from mft.training.loop import NonFiniteLoss
from mft_study.config import REWARDS
from mft_study.outcome import General, Measured, Unit
from mft_study.units.job import arm_of
from mft_study.workspace import ROWS, Workspace, remember_layers


def evaluation_options(workspace: Workspace, unit: Unit, general: str | None = None) -> Callable[[str], dict[str, Any]]:
    """Return a function from a split to the options of evaluate, which remembers outputs below the arm's layers."""
    arm = arm_of(workspace, unit)
    source = arm if arm.of is None else workspace.study.arms[arm.of]
    if source.whole_model:
        return lambda split: {"batch_size": ROWS}
    _, first = workspace.layers_of(arm, unit.setting)
    return lambda split: {"batch_size": ROWS, "first": first, "memory": workspace.memory(split, first, general)}


def measure_validation(workspace: Workspace, unit: Unit, model: nn.Module) -> Measured:
    """Evaluate model on the domain's validation split, with answers if validation chooses by them."""
    validation = workspace.splits(unit.domain).validation
    evaluation = evaluate(model, validation, **evaluation_options(workspace, unit)("validation"))
    if not math.isfinite(evaluation.loss):
        raise NonFiniteLoss(f"the loss must stay finite, got {evaluation.loss} on validation: lower the rate")
    measured = Measured(evaluation)
    if workspace.study.objective == REWARDS:
        answer(workspace, model, validation, measured)
    return measured


def answer(workspace: Workspace, model: nn.Module, dataset, measured: Measured) -> None:
    """Ask the questions of dataset, and record in measured how many answers are right."""
    options: dict[str, Any] = {}
    if workspace.study.objective == REWARDS:
        rewards = workspace.study.rewards
        options = {"max_new_tokens": rewards.max_completion_tokens, "verifier": rewards.verifier}
    measured.answers, measured.questions = exact_matches(model, workspace.tokenizer, dataset, **options)


def measure_general(
    workspace: Workspace, unit: Unit, model: nn.Module, split: str, start: nn.Module | None = None
) -> dict[str, General]:
    """Evaluate model on the general texts; if start is given, also its KL divergence from start, which takes long."""
    found = {}
    for name in workspace.study.general_of(unit.domain):
        dataset = getattr(workspace.general(name), split)
        options = evaluation_options(workspace, unit, name)(split)
        if start is None:
            found[name] = General(evaluate(model, dataset, **options))
            continue
        remembering = remember_layers(model, dataset, **options)
        kl = kl_divergence(model, start, dataset, **options, whole=remembering["memory"])[0]
        found[name] = General(evaluate(model, dataset, **remembering), kl)
    return found
