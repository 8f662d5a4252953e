"""The sweep over tiles: what is legal, how plan.py is asked and replaced, and what its choice is judged by."""

import functools
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace

import pytest
import torch

pytest.importorskip("triton", reason="the sweep compiles Triton kernels")

from benchmarks.gpu import competitors, device, results
from benchmarks.gpu.cases import SHAPES, SQUARE, TOKENS, Case, plan
from benchmarks.gpu.journal import FAILED, MEASURED, Journal
from benchmarks.gpu.sweep import __main__ as judged_anew
from benchmarks.gpu.sweep import ahead, measure
from benchmarks.gpu.sweep.configurations import Problem, instead, legal, planned, predicted
from mft_kernels.backends.triton import plan as tiles_plan
from mft_kernels.backends.triton.launch import record
from mft_kernels.backends.triton.plan import Operands, Tiles
from mft_kernels.backends.triton.target import H100, H100_OLD_TRITON, INTERPRETER, assume
from mft_kernels.eager import eager_linear

#: What a sweep of one shape is made of.
PROBLEMS = [Problem(case.detail, case.m, case.n, case.k) for case in plan(["sweep"], [SQUARE], TOKENS)]
BF16 = torch.bfloat16


def operands(problem):
    return Operands(2, 0 if problem.kind == "d_scores" else 2)


def launches(problem, target):
    m, n, k = problem.m, problem.n, problem.k
    tensors = [torch.empty(shape, dtype=BF16, device="meta") for shape in ((m, k), (m, n), (n, k), (n, k), ())]
    with assume(target), record() as found:
        ahead.run(problem, *tensors)
    return found


def taken(problem, target):
    """Tiles of the first launch, as plan.py names them; without group and splits."""
    launch = launches(problem, target)[0]
    rows, columns, inner = {
        "d_scores": ("BLOCK_N", "BLOCK_K", "BLOCK_M"),
        "backward": ("BLOCK_M", "BLOCK_K", "BLOCK_Q"),
    }.get(problem.kind, ("BLOCK_M", "BLOCK_P", "BLOCK_Q"))
    names = (rows, columns, inner, "num_warps", "STAGES", "maxnreg")
    return tuple(launch.options[name] for name in names)


def described(tiles):
    return tiles.rows, tiles.columns, tiles.inner, tiles.warps, tiles.stages, tiles.registers


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("target", [H100, H100_OLD_TRITON], ids=["register-fed", "plain"])
def test_the_adapter_asks_and_replaces_what_the_launcher_asks(problem, target):
    own = planned(problem, target, operands(problem))
    assert taken(problem, target) == described(own)
    other = replace(legal(problem, target, operands(problem))[-1], splits=1)
    assert described(other) != described(own)
    with instead(problem, other):
        assert taken(problem, target) == described(other)
    assert taken(problem, target) == described(own)


@pytest.mark.parametrize("target", [H100, H100_OLD_TRITON], ids=["register-fed", "plain"])
def test_legal_tiles_are_many_fit_the_card_and_are_compiled_in_time(target):
    found = {problem: legal(problem, target, operands(problem)) for problem in PROBLEMS}
    for problem, some in found.items():
        assert len(some) == len(set(some)) >= 70
        assert all(tiles.rows * tiles.columns / (32 * tiles.warps) < tiles.registers for tiles in some)
        assert all(tiles.splits == 1 for tiles in some) == (problem.m > 512)  # there are tiles for every multiprocessor
        assert {tiles.stages for tiles in some} >= {2, 3, 4}
    # 1.3 s each, of which 15 of the machine's 16 cores do one.
    assert sum(map(len, found.values())) * 1.3 / 15 < 0.65 * 90


def test_a_shape_takes_90_seconds():
    assert len(PROBLEMS) * measure.SECONDS <= 90
    every = [shape for shapes in SHAPES.values() for shape in shapes]
    assert {(c.n, c.k) for c in plan(["sweep"], every, TOKENS)} == {SQUARE}
    assert {(c.n, c.k) for c in plan(["sweep"], [(1024, 4096), (11008, 4096)], TOKENS)} == {(1024, 4096), (11008, 4096)}


def test_compiling_stops_at_the_deadline_and_says_what_cannot_be_compiled(monkeypatch):
    problem, some = PROBLEMS[0], legal(PROBLEMS[0], H100, Operands(2, 2))[:8]

    def compile_one(problem, target, tiles):
        time.sleep(1.0 if tiles == some[5] else 0.01)
        return "CompilationError: no" if tiles == some[1] else None

    with ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(ahead, "_pool", lambda: pool)
        monkeypatch.setattr(ahead, "compile_one", compile_one)
        before = time.time()
        done = ahead.compile_all(problem, H100, some, before + 0.5)
        assert time.time() - before < 0.9
    assert list(done) == some[:5]
    assert done[some[1]] == "CompilationError: no"
    assert done[some[0]] is None


def test_a_compiler_that_crashes_costs_what_it_had_not_done(monkeypatch):
    some = legal(PROBLEMS[0], H100, Operands(2, 2))[:3]
    pools = []

    def pool():
        pools.append(ThreadPoolExecutor(1))
        return pools[-1]

    def compile_one(problem, target, tiles):
        if tiles == some[1]:
            raise BrokenProcessPool("a child process terminated abruptly")

    monkeypatch.setattr(ahead, "_pool", functools.cache(pool))
    monkeypatch.setattr(ahead, "compile_one", compile_one)
    done = ahead.compile_all(PROBLEMS[0], H100, some, time.time() + 30)
    assert some[1] not in done
    ahead.compile_all(PROBLEMS[0], H100, some[:1], time.time() + 30)
    assert len(pools) == 2
    for one in pools:
        one.shutdown()


def test_who_compiles_sees_no_gpu_and_interprets_nothing(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with ahead._apart():
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
        assert "TRITON_INTERPRET" not in os.environ
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["TRITON_INTERPRET"]) == ("3", "1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with ahead._apart():
        pass
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_what_the_compiler_refuses_has_a_reason(monkeypatch):
    def fail(*_):
        raise RuntimeError("first\nout of registers")

    monkeypatch.setattr(ahead, "compile_ahead", fail)
    assert ahead.compile_one(PROBLEMS[0], H100, legal(PROBLEMS[0], H100, Operands(2, 2))[0]) == (
        "RuntimeError: out of registers"
    )


# ---------------------------------------------------------------------------------------------- measured and judged


class OnHost(device.Interpreter):
    """The dry run's device, without an emulator."""

    def __init__(self):
        self.without = {}


@pytest.fixture
def sweep(monkeypatch):
    """time_sweep of a forward that nobody has to compile or interpret."""
    monkeypatch.setattr(measure, "compile_all", lambda problem, target, some, deadline: dict.fromkeys(some))
    monkeypatch.setattr(measure, "target_of", lambda on: INTERPRETER)
    case = Case("sweep", 24, 40, 3, "forward")
    return lambda: measure.time_sweep(case, competitors.Inputs(OnHost()), OnHost(), 60.0)


#: p and q differ, and tell a model of the forward's.
OBLONG = Problem("d_x", 2048, 11008, 4096)


def record_of(times):
    """{tiles: ms} as a sweep stores it."""
    found = [{"tiles": asdict(tiles), "ms": ms} for tiles, ms in times.items()]
    return {"detail": OBLONG.kind, "n": OBLONG.n, "k": OBLONG.k, "m": OBLONG.m, "target": asdict(H100),
            "configurations": found}  # fmt: skip


def test_regret_is_of_the_choice_and_error_of_the_model(monkeypatch):
    own = planned(OBLONG, H100, Operands(2, 2))
    others = [tiles for tiles in legal(OBLONG, H100, Operands(2, 2)) if tiles != own][:2]
    times = {own: 1.2, others[0]: 1.0, others[1]: 2.0}
    found = measure.judge(record_of(times))
    assert found["regret"] == pytest.approx(0.2)
    assert (found["choice"], found["best"]) == (asdict(own), asdict(others[0]))
    expected = {own: 1.2e-3, others[0]: 1.5e-3, others[1]: 1.8e-3}  # seconds: right, 50 % and 10 % off

    def model(target, m, p, q, given, tiles):
        assert (target, m, p, q, given) == (H100, 2048, 4096, 11008, Operands(2, 2))
        return expected[tiles]

    del times[own]
    assert measure.judge(record_of(times))["regret"] is None
    nothing = measure.judge(record_of({}))
    assert (nothing["best"], nothing["error"]) == (None, None)
    times[own] = 1.2
    monkeypatch.setattr(tiles_plan, "product_seconds", model)
    assert planned(OBLONG, H100, Operands(2, 2)) == own  # remembered
    assert measure.judge(record_of(times))["error"] == pytest.approx(0.1)


def test_the_model_is_asked_for_each_kind_of_product():
    """Tiles that are worse by its own account take longer, in each."""
    for kind in ("forward", "d_x", "d_scores", "backward"):
        problem, given = Problem(kind, 2048, 4096, 11008), Operands(2, 0 if kind == "d_scores" else 2)
        own = planned(problem, H100, given)
        small = replace(own, rows=64, columns=64, splits=1)
        assert 0 < predicted(problem, H100, given, own) < predicted(problem, H100, given, small)


def test_every_configuration_is_checked_timed_and_stored(sweep, monkeypatch, tmp_path, capsys):
    launched = []

    def replaced(problem, tiles):
        launched.append(tiles)
        return instead(problem, tiles)

    monkeypatch.setattr(measure, "instead", replaced)

    def run(problem, x, grad, *rest):
        return [eager_linear(x, *rest) + (wrong and launched[-1].columns == 64)]

    wrong = True
    monkeypatch.setattr(measure, "run", run)
    status, fields = sweep()
    assert status == FAILED
    assert {found["tiles"]["columns"] for found in fields["configurations"]} == {32}
    assert fields["failures"]
    assert all("columns=64" in tiles and "from the eager" in why for tiles, why in fields["failures"].items())
    wrong = False
    status, fields = sweep()
    assert status == MEASURED
    assert len(fields["configurations"]) == 3 <= fields["legal"]  # of a dry run
    assert fields["judged"]["regret"] >= 0
    case = Case("sweep", 24, 40, 3, "forward")
    journal = Journal(tmp_path / "journal")
    journal.add("about", environment={"device": "a card"}, ceilings={})
    journal.record(case, status, **fields)
    results.write(tmp_path, journal, [case])
    assert f"| forward, 24 x 40, M = 3 | 3 of {fields['legal']} |" in (tmp_path / "gpu.md").read_text()
    assert judged_anew.main([str(tmp_path / "gpu-sweep.json")]) == 0
    assert "forward, 24 x 40, M = 3: regret " in capsys.readouterr().out
    assert Tiles(**json.loads((tmp_path / "gpu-sweep.json").read_text())["cases"][0]["judged"]["choice"])
    assert judged_anew.main([str(tmp_path / "none.json")]) == 2
