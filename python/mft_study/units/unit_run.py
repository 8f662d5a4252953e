"""Run a unit from its start to an outcome on validation, and later evaluate it on test."""

from mft.evaluation.temperature import evaluate_tempered, fit_temperature
from mft.training.loop import NonFiniteLoss
from mft_kernels.internal import NonFiniteScores
from mft_study.arms.full import Full
from mft_study.arms.weights import save_weights
from mft_study.outcome import Measured, Outcome, Tested
from mft_study.peft_methods import MethodFailsError
from mft_study.units.job import Job, arm_of, ground_of, model_of
from mft_study.units.measure import answer, evaluation_options, measure_general, measure_validation
from mft_study.units.train import train_unit
from mft_study.workspace import Workspace, remember_layers


def run_unit(workspace: Workspace, job: Job) -> Outcome:
    """Train the unit and evaluate it on validation. A run that is not finite, or fails, is an outcome too."""
    unit, arm = job.unit, arm_of(workspace, job.unit)
    workspace.begin(unit.domain, job.starts, unit.seed)
    try:
        if arm.lrs:
            return train_unit(workspace, job)
        ground = ground_of(workspace, job)
        weights = arm.made_weights(ground)
        if weights is not None:
            save_weights(weights, job.trained)
        model = model_of(workspace, job)
        if arm.tempered:
            validation = workspace.splits(unit.domain).validation
            options = evaluation_options(workspace, unit)("validation")
            temperature = fit_temperature(model, validation, **options)
            _, tempered = evaluate_tempered(model, validation, temperature, **options)
            measured = Measured(tempered, tempered, temperature)
        else:
            measured = measure_validation(workspace, unit, model)
    except (NonFiniteLoss, NonFiniteScores, MethodFailsError) as error:
        return Outcome(unit, None, diverged=str(error), fails=isinstance(error, MethodFailsError))
    return Outcome(
        unit,
        measured,
        [(1.0, measured.evaluation.loss)],
        bytes=arm.stored_bytes(ground, model),
        resident=arm.resident_bytes(ground, model),
        general=measure_general(workspace, unit, model, "validation"),
    )


def run_test(workspace: Workspace, job: Job) -> Tested:
    """Evaluate a unit's model on validation again and on test, also at the temperature that is best on validation."""
    unit, arm = job.unit, arm_of(workspace, job.unit)
    is_full = isinstance(arm, Full)  # its own model becomes workspace.model, where others start
    workspace.begin(unit.domain, (job.trained,) if is_full else job.starts, unit.seed)
    model, splits = model_of(workspace, job), workspace.splits(unit.domain)
    options, temperature = evaluation_options(workspace, unit), 0.0
    measured = {}
    for split in ("validation", "test"):
        dataset = getattr(splits, split)
        remembering = remember_layers(model, dataset, **options(split))
        if split == "validation":
            temperature = fit_temperature(model, dataset, **remembering)
        plain, tempered = evaluate_tempered(model, dataset, temperature, **remembering)
        measured[split] = Measured(tempered if arm.tempered else plain, tempered, temperature)
        if unit.domain in workspace.study.answers:
            answer(workspace, model, dataset, measured[split])
    start = workspace.base if is_full else workspace.model
    return Tested(
        unit, measured["validation"], measured["test"], measure_general(workspace, unit, model, "test", start)
    )
