"""A run that stops and continues gives the same losses and scores bit for bit as without a stop, in every way."""

import copy
import itertools
import math
import os
import signal
from functools import partial

import pytest
import torch
from tiny import equal, make_gpt2, make_llama, make_rows, masked_llama
from tiny_run import assert_goes_on_bit_for_bit
from tiny_ways import WAYS, masked_mixture

from mft.config import MaskConfig, TrainConfig
from mft.masks.convert import mask_model
from mft.masks.quantize import quantize_model
from mft.training.checkpoint import newest_checkpoint
from mft.training.loop import finetune, train_masks
from mft.training.saver import Saver, Stopped

STEPS, FIRST = 9, 4
ROWS = 10  # a step takes 4: epochs end within steps, and within micro-batches of 4


def masks(dtype=torch.float32, *, quantized=None, **mask):
    model = masked_llama(dtype=dtype, **mask)
    return model if quantized is None else quantize_model(model, quantized, masked=True)


def gpt2():
    return make_gpt2(dropout=0.1, n_layer=3, n_head=2)


def masked_gpt2():
    return mask_model(gpt2(), MaskConfig.paper(layers_to_transform=[1, 2]))


EIGHT, FREE = {"moments": "8bit"}, {"mode": "value", "threshold": 0.0, "init": "magnitude"}
CODED = {"quantized": "nf4", "scores_dtype": "int16"}
RUNS = {
    "weights": (make_llama, finetune, {}, {}),
    "16-bit weights on masters": (lambda: make_llama(torch.bfloat16), finetune, {}, {}),
    "plain": (masks, train_masks, {}, {"way": "plain"}),
    "weights, dropout": (gpt2, finetune, {}, {}),
    "plain, dropout": (masked_gpt2, train_masks, {}, {"way": "plain"}),
    "plain, dropout, checkpointed": (masked_gpt2, train_masks, {"gradient_checkpointing": True}, {"way": "plain"}),
    "plain, with modules_to_save": (lambda: masks(modules_to_save=["lm_head"]), train_masks, {}, {"way": "plain"}),
    "plain, bf16": (lambda: masks(scores_dtype="bfloat16"), train_masks, EIGHT, {"way": "plain"}),
    "plain, clipped": (masks, train_masks, {"max_grad_norm": 0.1}, {"way": "plain"}),
    "resident": (lambda: masks(scores_dtype="int16"), train_masks, EIGHT, {"way": "resident"}),
    "resident, fp32": (lambda: masks(torch.bfloat16), train_masks, {}, {"way": "resident"}),
    "resident, free threshold": (lambda: masks(**FREE), train_masks, {}, {"way": "resident"}),
    "quantized": (lambda: masks(torch.bfloat16, **CODED), train_masks, EIGHT, {"way": "quantized"}),
    "layerwise": (lambda: masks(scores_dtype="int16"), train_masks, EIGHT, {"way": "layerwise"}),
}
RUNS |= {
    f"{way}, a mixture": (partial(masked_mixture, scores_dtype="bfloat16"), train_masks, EIGHT, {"way": way})
    for way in ("plain", *WAYS)
}


def settings(**changes):
    return TrainConfig(**{"lr": 1e-2, "steps": STEPS, "batch_size": 2, "accumulation": 2, "seed": 3} | changes)


BATCHES = {"accumulated": {}, "whole": {"batch_size": 4, "accumulation": 1}}
# Runs take the batches in turn, because a checkpoint's contents do not depend on them. layerwise takes both: its sums
# have memory of their own.
IN_TURN = [*zip(RUNS, itertools.cycle(BATCHES)), ("layerwise", "accumulated")]


@pytest.mark.parametrize(("name", "batch"), IN_TURN)
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, name, batch):
    make, run, changes, options = RUNS[name]
    train, rows = settings(**changes, **BATCHES[batch]), make_rows(ROWS)
    assert_goes_on_bit_for_bit(lambda model, **more: run(model, rows, train, **options, **more), make, tmp_path, FIRST)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    train, rows = settings(steps=1), make_rows(ROWS)
    train_masks(masks(), rows, train, saver=Saver(tmp_path, math.inf))
    checkpoint, _ = newest_checkpoint(tmp_path)
    other = masked_llama(layers=(1, 2, 3))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"learned.model.layers.1.mlp.down_proj.scores is missing there"):
        train_masks(other, rows, train, saver=Saver(tmp_path, math.inf, checkpoint))
    assert equal(other.state_dict(), before)
    with pytest.raises(ValueError, match=r"must be torch.bfloat16 of shape .*, the checkpoint has torch.float32"):
        train_masks(masks(scores_dtype="bfloat16"), rows, train, saver=Saver(tmp_path, math.inf, checkpoint))


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture
def ending():
    """Let SIGHUP raise an error here instead of ending pytest."""

    def end(number, frame):
        raise AssertionError(f"{signal.Signals(number).name} ended the run")

    before = signal.signal(signal.SIGHUP, end)
    yield end
    signal.signal(signal.SIGHUP, before)


def test_signals_act_as_before_once_training_is_over(tmp_path):
    before = [signal.getsignal(number) for number in SIGNALS]
    train_masks(masks(), make_rows(ROWS), settings(steps=1), saver=Saver(tmp_path, 0))
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_terminal_that_closes_stops_a_run_as_sigterm_does(tmp_path, ending):
    """The kernel and the shell each send a SIGHUP: the second one does not end the run before its checkpoint."""

    def hang_up(report):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGHUP)

    with pytest.raises(Stopped, match="129"):
        train_masks(masks(), make_rows(ROWS), settings(), on_step=hang_up, saver=Saver(tmp_path, math.inf))
    assert newest_checkpoint(tmp_path)[0].step == 1
    assert signal.getsignal(signal.SIGHUP) is ending


def test_a_run_under_nohup_outlives_its_terminal(tmp_path, ending):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    hang_up = lambda report: os.kill(os.getpid(), signal.SIGHUP)  # noqa: E731
    reports = train_masks(masks(), make_rows(ROWS), settings(), on_step=hang_up, saver=Saver(tmp_path, math.inf))
    assert len(reports) == STEPS
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
