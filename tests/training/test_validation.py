"""Evaluation during training: it changes no bit of what is learned, in any way, and its decisions survive a resume."""

import math
import os
import signal

import pytest
import torch
from test_resume import RUNS
from tiny import equal, make_rows
from tiny_run import Killed

from mft.config import TrainConfig
from mft.evaluation.evaluate import evaluate
from mft.masks.convert import masked_modules
from mft.training.best import Best
from mft.training.checkpoint import newest_checkpoint
from mft.training.loop import train_masks
from mft.training.saver import Saver, Stopped
from mft.training.validation import Validation

ROWS, HELD_OUT = make_rows(10), make_rows(6, seed=1)
WAYS = [
    *("16-bit weights on masters", "plain", "plain, dropout", "plain, with modules_to_save", "plain, bf16"),
    *("resident", "resident, free threshold", "quantized", "layerwise"),
]


def settings(steps=8, **changes):
    """Return settings with a constant rate, so that a run with fewer steps is the beginning of this one."""
    fixed = {"lr": 1e-2, "schedule": "constant", "warmup_ratio": 0.0, "batch_size": 2, "accumulation": 2, "seed": 3}
    return TrainConfig(**fixed | {"steps": steps} | changes)


class BestAt2(Validation):
    """A validation whose second step is the best, whatever its loss."""

    def _judge(self, step, loss, train):
        super()._judge(step, loss, train)
        self.standing.best = min(step, 2)


def exported(model):
    """Return what save_masks and save_model write of a model."""
    masks = {name: module.packed_mask() for name, module in masked_modules(model).items()}
    return masks | {name: p.detach() for name, p in model.named_parameters() if not name.endswith("scores")}


@pytest.mark.parametrize("name", WAYS)
def test_evaluation_moves_no_bit_of_a_run_and_is_that_of_the_model_then(tmp_path, name):
    make, run, changes, options = RUNS[name]
    quiet, found = make(), {}
    wanted = run(quiet, ROWS, settings(4, **changes), **options)
    short = make()
    run(short, ROWS, settings(2, **changes), **options)

    def note(step, result, seconds, standing):
        found[step] = result

    model = make()
    validation = BestAt2(HELD_OUT, best=Best(tmp_path), on_result=note)
    reports = run(model, ROWS, settings(4, eval_every=2, keep_best=True, **changes), validation=validation, **options)
    assert [report.loss for report in reports] == [report.loss for report in wanted]
    assert equal(model.state_dict(), quiet.state_dict())
    where = {"batch_size": 4, "way": options.get("way", "plain")}
    for step, then in ((2, short), (4, quiet)):
        assert torch.equal(found[step].loss_sums, evaluate(then, HELD_OUT, **where).loss_sums)
    Best(tmp_path).put(model, 2)
    assert equal(exported(model), exported(short))
    assert not equal(exported(short), exported(quiet))


def test_random_numbers_that_evaluation_draws_are_none_of_training_s():
    make, run, changes, options = RUNS["plain, dropout"]
    models = [make(), make()]

    def draw(*_):
        torch.rand(3)

    for model in models:
        model.get_input_embeddings().register_forward_hook(draw)
    run(models[0], ROWS, settings(**changes), **options)
    validation = Validation(HELD_OUT)
    run(models[1], ROWS, settings(eval_every=3, **changes), validation=validation, **options)
    assert equal(models[1].state_dict(), models[0].state_dict())


def test_steps_are_evaluated_as_often_as_asked_and_the_last_always():
    found = []
    validation = Validation(HELD_OUT, on_result=lambda step, *_: found.append(step))
    train_masks(RUNS["plain"][0](), ROWS, settings(eval_every=3), validation=validation)
    assert found == [3, 6, 8]


def test_minutes_are_counted_from_one_evaluation_to_the_next(monkeypatch):
    now, found = [0.0], []
    monkeypatch.setattr("mft.training.validation.time.monotonic", lambda: now[0])

    def on_step(report):
        now[0] += 25

    validation = Validation(HELD_OUT, on_result=lambda step, *_: found.append(step))
    train_masks(RUNS["plain"][0](), ROWS, settings(eval_minutes=1), validation=validation, on_step=on_step)
    assert found == [3, 6, 8]


def test_the_seconds_of_a_step_are_those_of_training(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("mft.training.loop.time.perf_counter", lambda: now[0])

    def pass_time(seconds):
        now[0] += seconds

    reports = train_masks(
        RUNS["plain"][0](),
        ROWS,
        settings(4, eval_every=1),
        on_step=lambda _: pass_time(1),
        validation=Validation(HELD_OUT, on_result=lambda *_: pass_time(100)),
    )
    assert [report.seconds for report in reports] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("losses", "patience", "min_delta", "stopped", "best"),
    [
        ([2.5, 2.495, 2.48, 2.481, 2.475], 2, 0.01, 5, 5),  # the page's example
        ([2.5, 2.4, 2.3], 1, 0.0, None, 3),
        ([2.5, 2.5], 1, 0.0, 2, 1),
        ([2.5, 2.6, 2.4, 2.6, 2.6], 2, 0.0, 5, 3),
        ([2.5, 2.6, 2.7], None, 0.0, None, 1),
    ],
)
def test_patience_is_counted_in_evaluations_without_a_loss_that_is_lower_by_enough(
    losses, patience, min_delta, stopped, best
):
    train, validation = settings(eval_every=1, patience=patience, min_delta=min_delta), Validation(HELD_OUT)
    ended = None
    for step, loss in enumerate(losses, 1):
        validation._judge(step, loss, train)
        ended = ended or (step if validation.standing.stopped else None)
    assert (ended, validation.standing.best) == (stopped, best)


@pytest.mark.parametrize("when", ["in the step", "while it is evaluated"])
def test_a_signal_leaves_the_evaluation_to_the_run_that_goes_on(tmp_path, when):
    make, run, changes, options = RUNS["layerwise"]
    train = settings(eval_every=4, keep_best=True, **changes)
    straight, wanted = make(), []
    best = Best(tmp_path / "straight")
    run(straight, ROWS, train, validation=Validation(HELD_OUT, best=best, on_result=noting(wanted)), **options)

    def stop(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    def attempt(model, found, checkpoint=None, stopping=False):
        validation = Validation(HELD_OUT, best=Best(tmp_path / "best"), batch_size=2, on_result=noting(found))
        on_step = None
        if stopping and when == "in the step":
            on_step = lambda report: stop() if report.step == 4 else None  # noqa: E731
            validation._shown = Interrupting(pytest.fail)  # it does not even begin
        if stopping and when != "in the step":
            validation._shown = Interrupting(stop)
        saver = Saver(tmp_path / "checkpoints", math.inf, checkpoint, counters=[validation])
        run(model, ROWS, train, on_step=on_step, saver=saver, validation=validation, **options)

    found = []
    with pytest.raises(Stopped):
        attempt(make(), found, stopping=True)
    assert found == []
    checkpoint, _ = newest_checkpoint(tmp_path / "checkpoints")
    assert checkpoint.step == 4
    model = make()
    attempt(model, found, checkpoint)
    assert [step for step, _ in found] == [4, 8]
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in wanted], rel=1e-6)
    assert equal(model.state_dict(), straight.state_dict())


class Interrupting:
    """Stands in for the display of an evaluation; it requests a stop after the first batch."""

    def __init__(self, stop):
        self.stop = stop

    def __call__(self, step):
        return self

    def __enter__(self):
        return lambda rows, tokens: self.stop()

    def __exit__(self, *_):
        pass


def noting(found):
    return lambda step, result, seconds, standing: found.append((step, result.loss))


def test_the_best_of_the_newest_checkpoint_stays_until_a_newer_one_knows_another(tmp_path, monkeypatch):
    train = settings(12, eval_every=2, keep_best=True, patience=3, min_delta=9.0)
    make = RUNS["plain"][0]

    def attempt(root, model, found=None, dies=None, minutes=0):
        validation = Validation(HELD_OUT, best=Best(root / "best"))
        saver = Saver(root, minutes, found, counters=[validation])
        save = saver.after_step

        def after_step(runner, reports, ended):
            if reports[-1].step == dies:  # after its best is written, but before the checkpoint
                raise Killed
            save(runner, reports, ended)

        monkeypatch.setattr(saver, "after_step", after_step)
        return train_masks(model, ROWS, train, saver=saver, validation=validation), validation.standing

    straight = make()
    reports, wanted = attempt(tmp_path / "straight", straight, minutes=math.inf)
    assert (reports[-1].step, wanted.stopped) == (8, True)
    assert newest_checkpoint(tmp_path / "straight")[0].step == 8
    with pytest.raises(Killed):
        attempt(tmp_path / "run", make(), dies=4)
    assert sorted(path.name for path in (tmp_path / "run/best").iterdir()) == ["step-00000002", "step-00000004"]
    model = make()
    found, _ = newest_checkpoint(tmp_path / "run")
    assert found.step == 3
    again, standing = attempt(tmp_path / "run", model, found)
    assert [report.loss for report in again] == [report.loss for report in reports]
    assert standing == wanted
    assert equal(model.state_dict(), straight.state_dict())
    # A run that has stopped takes no further step.
    found, _ = newest_checkpoint(tmp_path / "run")
    ended, standing = attempt(tmp_path / "run", make(), found)
    assert (ended[-1].step, standing) == (8, wanted)
