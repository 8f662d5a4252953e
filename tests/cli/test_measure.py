"""mft env --measure: what it times is correct, and its conclusions follow from the times."""

import io

import pytest
import torch

from mft.cli import measure
from mft.cli.measure import DENSE, EAGER, HELD, SCORES, Row, calls_of, conclusion, run_measure, verdict
from mft.contention import Contention
from mft.tracking.console import new_console
from mft_kernels.testing import random_inputs


def row(scores, held, eager=1.0, m=1):
    samples = {DENSE: [2.0, 2.0], SCORES: [2 * scores] * 2, HELD: [2 * held] * 2, EAGER: [2 * eager] * 2}
    return Row("bf16", "forward", m, samples)


@pytest.mark.parametrize(
    ("ratio", "told"), [(0.9, "faster"), (0.96, "level"), (1.0, "level"), (1.05, "level"), (1.06, "SLOWER")]
)
def test_five_percent_either_way_is_level(ratio, told):
    assert verdict(ratio) == told


def test_the_last_line_names_where_eager_would_be_better():
    assert conclusion([row(3.0, 0.8, 3.0)]) == "eager PyTorch is nowhere faster than what auto takes by more than 5 %"
    told = conclusion([row(3.0, 2.0, 2.0, m=7), row(1.0, 1.0)])
    assert told == (
        "auto would be better off with eager PyTorch in 1 of 4: forward, bf16, M = 7, from scores (1.50 times eager)"
    )


@pytest.mark.parametrize("busy", [(True, False), (False, True), (False, False)], ids=str)
def test_contention_is_told_before_anything_is_measured(busy, monkeypatch):
    """It is measured again at the end, because other work may have begun meanwhile."""
    found = iter(Contention((0.5 if waits else 1.0,)) for waits in busy)
    monkeypatch.setattr(measure, "core_share", lambda threads: next(found))
    monkeypatch.setattr(measure, "SIZES", (64, 32, 32))
    monkeypatch.setattr(measure, "measured", lambda size, seconds: [row(69.54, 2.0, 2.0)])
    console = new_console(io.StringIO(), width=120)
    run_measure(console, seconds=0.0)
    told = console.file.getvalue()
    assert told.startswith("the machine is busy" if busy[0] else "the machine is quiet")
    assert told.count("the machine is busy") == any(busy)
    assert ("69.54 SLOWER" in told) != any(busy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_timed_agrees(dtype):
    tolerance = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    calls = calls_of(random_inputs(5, 64, 64, dtype, dtype), 3)
    for op, place in (("forward", None), ("d_x", 0), ("d_scores", 2)):
        found = {name: call() for name, call in calls[op].items()}
        ours = found[SCORES] if place is None else found[SCORES][place]
        torch.testing.assert_close(ours, found[EAGER], **tolerance)
        assert not torch.equal(found[DENSE], found[EAGER])
        if op != "d_scores":  # the held mask's buffer is multiplied by weight and sign later
            held = found[HELD] if place is None else found[HELD][place]
            torch.testing.assert_close(held, found[EAGER], **tolerance)


def test_all_rows_are_measured_and_shown(monkeypatch):
    monkeypatch.setattr(measure, "SIZES", (64, 32, 32))
    monkeypatch.setattr(measure, "core_share", lambda threads: Contention((1.0,) * threads))
    console = new_console(io.StringIO(), width=120)
    rows = run_measure(console, seconds=0.0)
    assert len(rows) == len({(row.dtype, row.op, row.m) for row in rows}) == 18
    told = console.file.getvalue()
    assert "measuring: 18/18" in told
    assert "N = K = 32, 1 threads" in told  # there is no time for a larger one
    assert all(f"{op}, {dtype}" in told for op in measure.OPS for dtype in measure.DTYPES)
    assert told.splitlines()[-1].startswith(("eager PyTorch is nowhere", "auto would be better off"))
