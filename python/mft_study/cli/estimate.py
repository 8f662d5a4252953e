"""mft estimate --config: print what each arm of a study by rewards holds in a step, and whether it fits."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from mft.checks import check_rule
from mft.cli.estimate import machine_bytes
from mft.memory.fit import RESERVE, gigabytes
from mft.memory.model_config import read_model_config
from mft.memory.rewards_memory import Sizes, rewards_memory, rewards_peak
from mft.memory.shapes import ModelShape, shape_from_config
from mft.tracking.console import console, say
from mft_study.arms.full import Full
from mft_study.config import REWARDS, StudyConfig
from mft_study.load import load_study


def run_estimate_rewards(
    config: str,
    overrides: Sequence[str],
    model: str | None,
    *,
    device: str,
    device_bytes: float | None,
    as_json: bool,
) -> bool:
    """Print the memory of each arm, and return whether a step of every arm fits. model: None for the study's own.

    Raises: ValueError for a study that is not by rewards, or for an arm on layers that the model does not have.
    """
    study = load_study(config, list(overrides))
    rule = (
        f"be {REWARDS} for mft estimate --config, which counts steps of sampling and learning; else give --model alone"
    )
    check_rule(study.objective == REWARDS, "objective", rule, study.objective)
    shape = shape_of(study, model)
    there = machine_bytes() if device_bytes is None else device_bytes
    found = arms_memory(study, shape)
    fits = {name: rewards_peak(phases) + RESERVE[device] <= there for name, phases in found.items()}
    if as_json:
        print(json.dumps(as_dictionary(study, shape, found, fits, there), indent=2))
        return all(fits.values())
    rewards = study.rewards
    say(
        f"{shape.name}, a step of {rewards.answers} answers, at most {_prompt(study)} tokens before each and "
        f"{rewards.max_completion_tokens} in it, {rewards.micro_batch or rewards.answers} backpropagated at once; in "
        "GB = 1e9 bytes"
    )
    console.print(table(found, fits, there))
    if RESERVE[device]:
        say(f"{gigabytes(RESERVE[device])} of the GPU are set aside for its context and the allocator's fragments")
    if study.arms[str(study.first_of_kind(Full))].lrs:
        say("training by rewards only: mft estimate --model counts the full fine-tune before it")
    return all(fits.values())


def shape_of(study: StudyConfig, model: str | None) -> ModelShape:
    """Return the shape of the study's model, or of the given one, in the study's dtype."""
    if model is None and study.scratch is not None:
        from mft_study.from_scratch import model_config

        return shape_from_config(model_config(study.scratch).to_dict(), "from scratch", dtype="float32")
    name = study.model.name if model is None else model
    return shape_from_config(read_model_config(name), name, dtype=study.model.dtype)


def arms_memory(study: StudyConfig, shape: ModelShape) -> dict[str, dict[str, Sizes]]:
    """Return rewards_memory for each trained arm. The base is held too, if the arms start from a fine-tune of it."""
    copy = shape.parameters * shape.dtype_bytes
    base = copy if study.arms[str(study.first_of_kind(Full))].lrs else 0
    found = {}
    for name, arm in study.arms.items():
        if arm.learns:
            mask = arm.mask_config(study.mask)
            layers = mask.layers_to_transform
            found[name] = rewards_memory(
                shape,
                learns=arm.learns,
                answers=study.rewards.answers,
                prompt=_prompt(study),
                completion=study.rewards.max_completion_tokens,
                micro_batch=study.rewards.micro_batch,
                target_modules=mask.target_modules,
                layers=[layers] if isinstance(layers, int) else layers,
                gradient_checkpointing=study.rewards.gradient_checkpointing,
                rank=arm.largest_rank(),
                others=base + (copy if arm.teacher is not None else 0),
            )
    return found


def table(found: dict[str, dict[str, Sizes]], fits: dict[str, bool], there: float) -> Table:
    """Return a table with one row per arm: what each phase holds, the peak, and the available memory."""
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown.add_column("arm")
    for phase in (*next(iter(found.values())), "peak", "there is", "fits"):
        shown.add_column(phase, justify="right", no_wrap=True)
    for name, phases in found.items():
        sums = [sum(sizes.values()) for sizes in phases.values()]
        numbers = (f"{size / 1e9:.2f}" for size in (*sums, max(sums), there))
        shown.add_row(name, *numbers, "yes" if fits[name] else "no")
    return shown


def as_dictionary(
    study: StudyConfig, shape: ModelShape, found: dict[str, dict[str, Sizes]], fits: dict[str, bool], there: float
) -> dict[str, Any]:
    """Return the table's numbers."""
    return {
        "model": shape.name,
        "rewards": dataclasses.asdict(study.rewards),
        "prompt": _prompt(study),
        "device_limit_gb": there / 1e9,
        "arms": {
            name: {
                "peak_gb": rewards_peak(phases) / 1e9,
                "fits": fits[name],
                "gb": {phase: {kind: size / 1e9 for kind, size in of.items()} for phase, of in phases.items()},
            }
            for name, phases in found.items()
        },
    }


# ---------------------------------------------------------------------------------------------- private


def _prompt(study: StudyConfig) -> int:
    """Return the most tokens of a prompt: a row's length, since a row holds at least one prompt with its answer."""
    return max(study.questions.get(domain, data).sequence_length for domain, data in study.domains.items())
