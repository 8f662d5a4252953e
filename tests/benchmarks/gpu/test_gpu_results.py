"""What the GPU suite makes of its records: goals, tables, files, and the counts of a pytest run."""

import json

import pytest

pytest.importorskip("triton", reason="the GPU suite measures Triton kernels")

from gpu_records import CEILINGS, record, sample, step

from benchmarks.gpu import results, tables
from benchmarks.gpu.cases import AUTO, CUDA, DENSE, FUSED, PAPER, SQUARE, plan
from benchmarks.gpu.goals import NOT_APPLICABLE, Where, goals
from benchmarks.gpu.journal import FAILED, MEASURED, NOT_MEASURED, Journal


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path / "journal")


def test_a_goal_takes_the_worst_case():
    found = goals("step", [step(2048, 1.0, 1.5, 1.4), step(2048, 1.0, 1.4, 1.2, paper=4.0, shape=(1024, 4096))])
    assert [goal["state"] for goal in found] == ["met", "NOT MET", "met", "NOT MET"]
    assert found[1]["measured"]["median"] == pytest.approx(1.2)
    assert "worst of 2, 1024 x 4096, M = 2048" in found[1]["quantity"]


def test_never_slower_compares_with_the_faster_rival():
    states = [goals("step", [step(16, 1.0, 1.5, kept)])[2]["state"] for kept in (0.9, 0.995)]
    assert states == ["NOT MET", "met"]


def test_what_nobody_measured_is_neither_met_nor_missed():
    for what in ("forward", "d_x", "d_scores", "step", "correctness", "threshold"):
        for goal in goals(what, []):
            assert (goal["state"], goal["met"], goal["measured"]) == (NOT_MEASURED, None, None)
    assert goals("memory", []) == []


def test_cublas_is_the_goal_only_where_the_bytes_allow_it():
    slow = {DENSE: sample(1.0), FUSED: sample(2.0, of_cublas=50, floor=1.5)}  # no kernel could reach 90 %
    fast = {DENSE: sample(1.0), FUSED: sample(1.05, of_cublas=95, floor=0.5)}
    goal, _ = goals("forward", [record("forward", 1, slow), record("forward", 2048, fast)])
    assert goal["state"] == "met"
    assert "1 of 2 cases left out" in goal["quantity"]


HERE = {"device": "a card", "target": "sm_90", "weight_is_first_operand": True, "cuda_library": "CUDA C++, sm_80 sm_90"}


def judged(environment, what, cases=()):
    return [(goal["state"], goal["bound"], goal["quantity"]) for goal in goals(what, cases, Where.of(environment))]


def test_a_goal_follows_the_form_that_ran():
    """The plain form masks through shared memory: 70 % of cuBLAS is above what it is held to, and below the other's."""
    at = [record("forward", 2048, {DENSE: sample(1.0), FUSED: sample(1.4, of_cublas=70, floor=0.5)})]
    for fed, state, bound in ((True, "NOT MET", 90), (False, "met", 60)):
        found = judged(HERE | {"weight_is_first_operand": fed}, "forward", at)[0]
        assert found[:2] == (state, bound)
        assert f"{'register-fed' if fed else 'plain'} form" in found[2]
    slow = [step(2048, 1.0, 1.0, 1.1)]  # auto takes the passes themselves
    assert [g[0] for g in judged(HERE, "step", slow)] == ["NOT MET", "NOT MET", "met", "met"]
    plain = judged(HERE | {"weight_is_first_operand": False}, "step", slow)
    assert [g[0] for g in plain] == [NOT_APPLICABLE, NOT_APPLICABLE, "met", "met"]


def test_a_goal_of_a_kernel_that_cannot_run_there_is_not_applicable():
    poor = {DENSE: sample(1.0), FUSED: sample(1.0, floor=0.5), CUDA: sample(2.0, of_cublas=50, floor=0.5)}
    at = {what: [record(what, 4096, poor)] for what in ("forward", "d_scores")}
    assert [judged(HERE, what, at[what])[1][0] for what in at] == ["NOT MET", "NOT MET"]
    absent = HERE | {"cuda_library": "none: its library is not built"}
    general = HERE | {"cuda_lacks": ["score_grad_sm90: CUTLASS's headers are missing"]}
    for environment, states, why in (
        (absent, [NOT_APPLICABLE] * 2, "without cuda: its library is not built"),
        (general, ["NOT MET", NOT_APPLICABLE], "built without the card's own score_grad_sm90"),
        (HERE | {"target": "sm_80"}, [NOT_APPLICABLE] * 2, "asked of sm_90, this is sm_80"),
    ):
        found = [judged(environment, what, at[what])[1] for what in at]
        assert [g[0] for g in found] == states
        assert why in found[1][2]
    triton, cuda = judged(absent, "correctness", [{"detail": "exact", "passed": 1, "failed": 0, "status": MEASURED}])
    assert (triton[0], cuda[0]) == ("met", NOT_APPLICABLE)
    assert judged(absent, "threshold")[0][0] == NOT_APPLICABLE


def test_a_dry_run_judges_correctness_alone():
    dry = HERE | {"dry_run": True}
    fast = [record("forward", 2048, {DENSE: sample(1.0), FUSED: sample(1.0, floor=0.5)})]
    assert judged(HERE, "forward", fast)[0][0] == "met"
    assert [g[0] for g in judged(dry, "forward", fast)] == [NOT_MEASURED] * 2
    assert (
        judged(dry, "correctness", [{"detail": "exact", "passed": 1, "failed": 0, "status": MEASURED}])[0][0] == "met"
    )


def test_cuda_is_judged_on_llama2_7b_from_4096_tokens_on():
    def of_cublas(percent, m, shape):
        cuda = sample(1.0, of_cublas=percent, floor=0.5)
        return record("forward", m, {DENSE: sample(1.0), FUSED: sample(1.0, floor=0.5), CUDA: cuda}, shape)

    elsewhere = [of_cublas(10, 2048, SQUARE), of_cublas(10, 4096, (14336, 4096))]
    good, better = of_cublas(95.5, 4096, (11008, 4096)), of_cublas(99, 16384, SQUARE)
    for what, state in (("forward", "met"), ("d_x", "met"), ("d_scores", "NOT MET")):  # 95, 95 and 97 %
        _, goal = goals(what, [*elsewhere, good, better])
        assert goal["state"] == state
        assert goal["measured"]["median"] == 95.5
        assert "worst of 2, 11008 x 4096, M = 4096" in goal["quantity"]
    assert goals("forward", elsewhere)[1]["state"] == NOT_MEASURED
    wrong = good | {"m": 8192, "samples": {DENSE: sample(1.0)}, "failures": {CUDA: "wrong: 0.5 from the eager form"}}
    for cases in ([good, better, wrong], [wrong]):  # what was fast elsewhere does not make up for it
        _, goal = goals("forward", cases)
        assert goal["state"] == "NOT MET"
        assert "FAILED in 1" in goal["quantity"]


def test_the_selection_of_58_7_million_scores_is_judged_in_microseconds():
    def selection(ms, detail="bfloat16", shape=(4096, 14336)):
        of_both = {"kept_threshold": sample(0.01), "kept_threshold, cuda": sample(ms)}
        return record("threshold", 0, of_both, shape) | {"detail": detail}

    others = [selection(0.01, shape=SQUARE), selection(0.01, "float32")]
    for ms, state in ((0.079, "met"), (0.081, "NOT MET")):
        (goal,) = goals("threshold", [*others, selection(ms)])
        assert goal["state"] == state
        assert goal["measured"]["median"] == pytest.approx(1e3 * ms)
    assert goals("threshold", others)[0]["state"] == NOT_MEASURED


def test_each_backend_has_a_correctness_of_its_own():
    passed = {"detail": "exact", "passed": 3, "failed": 0, "skipped": 0, "status": MEASURED}
    wrong = {**passed, "detail": "cuda exact", "failed": 1}
    assert [goal["state"] for goal in goals("correctness", [passed, wrong])] == ["met", "NOT MET"]
    unproven = {"detail": "cuda memcheck", "status": NOT_MEASURED, "reason": "not found", "unproven": True}
    triton, cuda = goals("correctness", [passed, {**wrong, "failed": 0}, unproven])
    assert (triton["state"], cuda["state"]) == ("met", NOT_MEASURED)
    assert "without cuda memcheck" in cuda["quantity"]


def test_one_failed_check_misses_the_goal_and_a_missing_one_leaves_it_open():
    passed = {"detail": "exact", "passed": 3, "failed": 0, "skipped": 0, "status": MEASURED}
    missing = {"detail": "tests", "status": NOT_MEASURED, "reason": "no time"}
    assert goals("correctness", [passed])[0]["state"] == "met"
    assert goals("correctness", [passed, {**passed, "failed": 1}])[0]["state"] == "NOT MET"
    assert goals("correctness", [passed, {**passed, "complete": False}])[0]["state"] == "NOT MET"
    assert goals("correctness", [passed, missing])[0]["state"] == NOT_MEASURED
    assert goals("correctness", [{**passed, "failed": 2}, missing])[0]["state"] == "NOT MET"


def test_tables_come_from_the_json_alone(journal, tmp_path):
    planned = plan(["correctness", "step", "memory", "threshold"], [SQUARE], [2048, 8192])
    environment = {"device": "a card", "commit": "0123456789abcdef", "date": "today"}
    journal.add("about", environment=environment, ceilings=CEILINGS)
    by_what = {case.what: case for case in reversed(planned)}
    journal.record(planned[0], FAILED, passed=7, failed=1, skipped=0, complaints=["masked_linear: 3 elements differ"])
    fields = {k: v for k, v in step(2048, 1.0, 1.5, 1.4).items() if k in ("samples", "left_out")}
    fields["samples"][PAPER] |= {"method": "queued", "note": "its host code cannot be captured"}
    journal.record(by_what["step"], MEASURED, failures={FUSED: "wrong: 0.5 from the eager form"}, **fields)
    memory = {"peak_bytes": 3_000_000, "result_bytes": 1_000_000, "beyond_results_of_weight": 0.5}
    journal.record(by_what["memory"], MEASURED, samples={DENSE: memory}, weight_bytes=4_000_000)
    fast = sample(0.1) | {"times_faster_than_sort": 12.5}
    journal.record(by_what["threshold"], MEASURED, samples={"kept_threshold": fast})
    results.write(tmp_path, journal, planned)
    text = (tmp_path / "gpu.md").read_text()
    for expected in (
        "| correctness, step, memory, threshold | a card |",
        "| 0123456789ab |",
        "| 3.00 | 800 |",
        "| mask pass + cuBLAS / auto, M = 2048: worst of 1, 4096 x 4096, M = 2048 | 1.500 [1.500, 1.500] x |",
        "| exact | 7 | 1 | 0 |",
        "- masked_linear: 3 elements differ (exact)",
        "### step, N = 4096, K = 4096",
        "| 8192 | not measured | not measured |",
        "100 [100, 100] (q), 100 % |",
        "- fused FAILED: wrong: 0.5 from the eager form (4096 x 4096, M = 2048)",
        "- paper's layer was not captured: its host code cannot be captured",
        "| 4096 x 4096, M = 2048 | cuBLAS, unmasked | 3.0 | 1.0 | 50 | 4.0 |",
        "| 16.8M bfloat16 | kept_threshold | 0.1 [0.1, 0.1] | 12.5 | 50 |",
    ):
        assert expected in text, expected
    stored = json.loads((tmp_path / "gpu-step.json").read_text())
    assert stored["environment"]["device"] == "a card"
    assert [case["status"] for case in stored["cases"]] == [MEASURED, NOT_MEASURED]
    assert stored["cases"][0]["samples"][AUTO]["ms"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    documents = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("gpu-*.json"))]
    assert "16.8M" in tables.markdown(documents)


def test_a_slice_leaves_other_results_alone(journal, tmp_path):
    journal.add("about", environment={"device": "a card"}, ceilings=CEILINGS)
    for what in ("forward", "d_x"):
        planned = plan([what], [SQUARE], [64])
        journal.record(planned[0], MEASURED, samples={DENSE: sample(1.0)})
        results.write(tmp_path, journal, planned)
    text = (tmp_path / "gpu.md").read_text()
    assert "## Forward" in text
    assert "## d_x" in text


_PLAIN = """
tests/a.py::test_one PASSED      [ 50%]
tests/a.py::test_two[x] FAILED   [100%]
E   assert 1 == 2
FAILED tests/a.py::test_two[x] - assert 1 == 2
"""
_PARALLEL = """
tests/a.py::test_one
[gw0] [ 50%] PASSED tests/a.py::test_one
[gw1] [100%] SKIPPED tests/a.py::test_three
"""


def test_outcomes_are_counted_line_by_line():
    from benchmarks.gpu.own_tests import summarise

    status, fields = summarise(_PLAIN, 1, 60)
    assert (status, fields["passed"], fields["failed"], fields["complete"]) == (FAILED, 1, 1, True)
    assert fields["complaints"][0] == "tests/a.py::test_two[x] FAILED [100%]"
    status, fields = summarise(_PARALLEL, 0, 60)
    assert (status, fields["passed"], fields["skipped"]) == (MEASURED, 1, 1)
    status, fields = summarise(_PARALLEL, None, 60)
    assert (status, fields["passed"], fields["complete"]) == (FAILED, 1, False)
    assert fields["complaints"] == ["stopped after 60 s"]
    assert summarise("no tests ran", 5, 60)[0] == FAILED
