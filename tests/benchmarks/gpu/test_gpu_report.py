"""The GPU suite's conclusions from its records: failures, goals, and gpu.md."""

import json

import pytest

pytest.importorskip("triton", reason="the GPU suite measures Triton kernels")

from gpu_records import HERE, check, documents_of, record, results_of, sample, step

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import report
from benchmarks.gpu.cases import AUTO, CUDA, CUDA_PACKED, DENSE, FUSED, PAPER, SQUARE, Case, plan
from benchmarks.gpu.goals import MET, NOT_APPLICABLE, NOT_MET
from benchmarks.gpu.goals import goals as goals_of
from benchmarks.gpu.results import FAILED, MEASURED, NOT_MEASURED


def goals(what, cases, environment=HERE):
    return goals_of(what, cases, environment)


def states(what, cases, environment=HERE):
    return [goal.state for goal in goals(what, cases, environment)]


def test_a_goal_takes_the_worst_case():
    found = goals("step", [step(2048, 1.0, 1.5, 1.4), step(2048, 1.0, 1.4, 1.05, paper=4.0, shape=(1024, 4096))])
    assert [goal.state for goal in found] == [MET, NOT_MET, MET, NOT_MET]
    assert found[1].measured.median == pytest.approx(1.05)
    assert "worst of 2, 1024 x 4096, M = 2048" in found[1].quantity


def test_never_slower_compares_with_the_faster_rival():
    assert [states("step", [step(16, 1.0, 1.5, kept)])[2] for kept in (0.9, 0.995)] == [NOT_MET, MET]


def test_what_nobody_measured_is_neither_met_nor_missed():
    for what in ("forward", "d_x", "d_scores", "step", "correctness", "threshold"):
        for goal in goals(what, []):
            assert (goal.state, goal.measured) == (NOT_MEASURED, None)
    assert goals("memory", []) == []


def test_cublas_is_the_goal_only_where_the_bytes_allow_it():
    slow = {DENSE: sample(1.0), FUSED: sample(2.0, of_cublas=50, floor=1.5)}  # no kernel can reach 90 %
    fast = {DENSE: sample(1.0), FUSED: sample(1.05, of_cublas=95, floor=0.5)}
    goal, _ = goals("forward", [record("forward", 1, slow), record("forward", 2048, fast)])
    assert goal.state == MET
    assert "1 of 2 cases left out" in goal.quantity


def test_a_goal_follows_the_form_that_ran():
    """70 % of cuBLAS meets the goal of the plain form, which masks through shared memory, but not the other's."""
    at = [record("forward", 2048, {DENSE: sample(1.0), FUSED: sample(1.4, of_cublas=70, floor=0.5)})]
    plain = HERE | {"triton_kernels": "Triton 3.6, sm_90, plain form (docs/explanation/triton-kernels.md)"}
    for environment, state, bound, form in ((HERE, NOT_MET, 90, "register-fed"), (plain, MET, 60, "plain")):
        found = goals("forward", at, environment)[0]
        assert (found.state, found.bound) == (state, bound)
        assert f"{form} form" in found.quantity
    slow = [step(2048, 1.0, 1.0, 1.05)]  # "auto" itself takes the passes
    assert states("step", slow) == [NOT_MET, NOT_MET, MET, MET]
    assert states("step", slow, plain) == [NOT_APPLICABLE, NOT_APPLICABLE, MET, MET]


def test_the_form_is_told_as_the_backend_tells_it(monkeypatch):
    """goals.py reads backend_report, which holds the backend's own words."""
    from benchmarks.gpu.goals import _form
    from mft_kernels.backends import triton
    from mft_kernels.backends.triton import target

    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    for card, form in ((target.H100, "register-fed"), (target.H100_OLD_TRITON, "plain")):
        with target.assume(card):
            assert _form(HERE | {"triton_kernels": triton._detail()}) == form


def test_a_goal_of_a_kernel_that_cannot_run_there_is_not_applicable():
    poor = {DENSE: sample(1.0), FUSED: sample(1.0, floor=0.5), CUDA: sample(2.0, of_cublas=50, floor=0.5)}
    poor |= {CUDA_PACKED: poor[CUDA]}
    at = {what: [record(what, 4096, poor)] for what in ("forward", "d_scores")}
    assert [states(what, at[what])[1] for what in at] == [NOT_MET, NOT_MET]
    absent = HERE | {"cuda_library": "none: its library is not built"}
    general = HERE | {"cuda_lacks": ["score_grad_sm90: CUTLASS's headers are missing"]}
    for environment, expected, why in (
        (absent, [NOT_APPLICABLE] * 2, "without cuda: its library is not built"),
        (general, [NOT_MET, NOT_APPLICABLE], "built without the card's own score_grad_sm90"),
        (HERE | {"capability": [8, 0]}, [NOT_APPLICABLE] * 2, "asked of sm_90, this is sm_80"),
        (HERE | {"cuda": "hip 6.4"}, [NOT_APPLICABLE] * 2, "this is a GPU of AMD's"),
    ):
        found = [goals(what, at[what], environment)[1] for what in at]
        assert [goal.state for goal in found] == expected
        assert why in found[1].quantity
    assert states("correctness", [check("exact", passed=1, failed=0)], absent) == [MET, NOT_APPLICABLE]
    assert states("threshold", [], absent) == [NOT_APPLICABLE]


def test_a_dry_run_judges_correctness_alone():
    dry = HERE | {"dry_run": True}
    fast = [record("forward", 2048, {DENSE: sample(1.0), FUSED: sample(1.0, floor=0.5)})]
    assert states("forward", fast)[0] == MET
    assert states("forward", fast, dry) == [NOT_MEASURED] * 2
    assert states("correctness", [check("exact", passed=1, failed=0)], dry)[0] == MET


def test_cuda_is_judged_on_llama2_7b_from_4096_tokens_on():
    def of_cublas(percent, m, shape):
        cuda = sample(1.0, of_cublas=percent, floor=0.5)
        others = {DENSE: sample(1.0), FUSED: sample(1.0, floor=0.5)}
        return record("forward", m, others | {CUDA: cuda, CUDA_PACKED: cuda}, shape)

    elsewhere = [of_cublas(10, 2048, SQUARE), of_cublas(10, 4096, (14336, 4096))]
    good, better = of_cublas(95.5, 4096, (11008, 4096)), of_cublas(99, 16384, SQUARE)
    for what, state in (("forward", MET), ("d_x", NOT_MET), ("d_scores", MET)):  # 94, 97 and 90 %
        _, goal = goals(what, [*elsewhere, good, better])
        assert goal.state == state
        assert goal.measured.median == 95.5
        assert "worst of 2, 11008 x 4096, M = 4096" in goal.quantity
    assert states("forward", elsewhere)[1] == NOT_MEASURED
    wrong = good | {
        "m": 8192,
        "samples": {DENSE: sample(1.0)},
        "failures": {CUDA_PACKED: "wrong: 0.5 from the eager form"},
    }
    for cases in ([good, better, wrong], [wrong]):  # speed elsewhere does not compensate for it
        _, goal = goals("forward", cases)
        assert goal.state == NOT_MET
        assert "FAILED in 1" in goal.quantity


def test_the_selection_of_58_7_million_scores_is_judged_in_microseconds():
    def selection(ms, detail="bfloat16", shape=(4096, 14336)):
        return record("threshold", 0, {"kept_threshold, cuda": sample(ms)}, shape, detail)

    others = [selection(0.01, shape=SQUARE), selection(0.01, "float32")]
    for ms, state in ((0.079, MET), (0.081, NOT_MET)):
        (goal,) = goals("threshold", [*others, selection(ms)])
        assert goal.state == state
        assert goal.measured.median == pytest.approx(1e3 * ms)
    assert states("threshold", others) == [NOT_MEASURED]


def test_each_backend_has_a_correctness_of_its_own():
    passed = check("exact", passed=3, failed=0)
    assert states("correctness", [passed, check("cuda exact", passed=3, failed=1)]) == [MET, NOT_MET]
    unproven = check("cuda memcheck", NOT_MEASURED, reason="not found", unproven=True)
    triton, cuda = goals("correctness", [passed, check("cuda exact", passed=3, failed=0), unproven])
    assert (triton.state, cuda.state) == (MET, NOT_MEASURED)
    assert "without cuda memcheck" in cuda.quantity


def test_one_failed_check_misses_the_goal_and_a_missing_one_leaves_it_open():
    passed, failed = check("exact", passed=3, failed=0), check("random", passed=3, failed=2)
    missing = check("tests", NOT_MEASURED, reason="no time")
    for cases, state in (
        ([passed], MET),
        ([passed, failed], NOT_MET),
        ([passed, check("random", passed=3, failed=0, complete=False)], NOT_MET),
        ([passed, missing], NOT_MEASURED),
        ([failed, missing], NOT_MET),
    ):
        assert states("correctness", cases)[0] == state


# ---------------------------------------------------------------------------------------------- what failed, first


def test_what_failed_comes_first_and_in_words():
    text = report.text(
        documents_of(
            check("exact", FAILED, passed=7, failed=1, complaints=["masked_linear: 3 elements differ"]),
            check("cuda exact", FAILED, reason="hung: no end after 225 s"),
            record("step", 2048, {DENSE: sample(1.0)}) | {"status": FAILED, "failures": {FUSED: "wrong: 0.5"}},
            record("d_x", 1, {}) | {"status": FAILED, "reason": "the process died, exit code -11"},
        )
    )
    sections = text.split("## ")[1:]
    assert sections[0] == (
        "What failed\n\n"
        "- correctness exact: 1 of 8 checks failed\n"
        "- correctness exact: masked_linear: 3 elements differ\n"
        "- correctness cuda exact: hung: no end after 225 s\n"
        "- step 4096 x 4096, M = 2048: fused: wrong: 0.5\n"
        "- d_x 4096 x 4096, M = 1: the process died, exit code -11\n\n\n"
        "0 of 4 cases were measured, 4 failed.\n\n"
    )
    assert sections[1].startswith("Goals")
    assert "| M = 2048 | 1, 100 %, 50 / 60 | FAILED |" in text
    assert "## What failed\n\nNothing.\n" in report.text(documents_of(check("exact", passed=1, failed=0)))


def exit_code_of(tmp_path, capsys, *records, environment=HERE):
    """Return (exit code, output, gpu.md)."""
    results = results_of(tmp_path, [Case.of(each) for each in records], environment)
    for each in records:
        fields = {key: value for key, value in each.items() if key not in ("what", "n", "k", "m", "detail", "status")}
        results.set(Case.of(each), each["status"], **fields)
    code = command.main(["--report", str(tmp_path)])
    return code, capsys.readouterr().out, (tmp_path / "gpu.md").read_text()


@pytest.mark.parametrize(("failed", "expected"), [(0, 3), (1, 1)])
def test_a_missing_sanitizer_ends_with_exit_code_3_and_all_results_written(tmp_path, capsys, failed, expected):
    exact = check("cuda exact", FAILED if failed else MEASURED, passed=1, failed=failed, complaints=[])
    unproven = check("cuda memcheck", NOT_MEASURED, reason="not found: nowhere", unproven=True)
    code, said, text = exit_code_of(tmp_path, capsys, exact, unproven)
    assert code == expected
    assert "UNPROVEN: cuda memcheck: not found: nowhere" in said
    assert "- UNPROVEN: cuda memcheck: not found: nowhere" in text
    assert "| cuda memcheck | not measured |" in text


def test_a_library_without_the_card_s_own_kernels_ends_with_exit_code_3(tmp_path, capsys, monkeypatch):
    """General kernels must not be measured against the goals of Hopper's kernels."""
    from benchmarks.gpu import device

    why = "CUTLASS's headers are missing"
    monkeypatch.setattr(device, "report", lambda part: {"left_out": {"score_grad_sm90": why}})
    lacks = device.lacking((9, 0))
    assert lacks == [f"score_grad_sm90: {why}"]
    assert device.lacking((8, 0)) == device.lacking((10, 0)) == []
    environment = HERE | {"cuda_lacks": lacks}
    exact = check("cuda exact", passed=1, failed=0)
    code, said, _ = exit_code_of(tmp_path, capsys, exact, environment=environment)
    assert code == 3
    assert f"LACKING: this card's own score_grad_sm90: {why}; the general kernels" in said


def test_a_missing_library_is_a_warning_at_the_top_and_in_the_table(tmp_path, capsys):
    why = "its library is not built: no nvcc"
    code, said, text = exit_code_of(
        tmp_path,
        capsys,
        check("exact", passed=1, failed=0),
        check("cuda exact", NOT_MEASURED, reason=f"without cuda: {why}"),
        environment=HERE | {"cuda_library": f"none: {why}"},
    )
    assert code == 0
    assert f"WARNING: the CUDA kernels were left out: {why}" in said
    assert f"- WARNING: the CUDA kernels were left out: {why}" in text
    assert f"| none: {why} |" in text


# ---------------------------------------------------------------------------------------------- tables


def test_tables_come_from_the_files_alone(tmp_path):
    planned = plan(["correctness", "step", "memory", "threshold", "train"], [SQUARE], [2048, 8192])
    environment = HERE | {"commit": "0123456789abcdef"}
    results = results_of(tmp_path, planned, environment)
    by_what = {case.what: case for case in reversed(planned)}
    results.set(planned[0], MEASURED, passed=7, failed=0, skipped=1, complaints=["2 warnings"])
    samples = step(2048, 1.0, 1.5, 1.4)["samples"]
    samples[PAPER] |= {"method": "queued", "note": "its host code cannot be captured"}
    results.set(by_what["step"], MEASURED, samples=samples, failures={}, left_out={FUSED: "nobody asked"})
    memory = {"peak_bytes": 3_000_000, "result_bytes": 1_000_000, "beyond_results_of_weight": 0.5}
    results.set(by_what["memory"], MEASURED, samples={DENSE: memory}, weight_bytes=4_000_000)
    results.set(by_what["threshold"], MEASURED, samples={"kept_threshold": sample(0.1)})
    step_of_train = {"ms": {"median": 20.5, "low": 20.0, "high": 21.0}, "peak_bytes": 1_500_000_000}
    results.set(by_what["train"], MEASURED, samples={"a step": step_of_train})
    report.write(tmp_path)
    text = (tmp_path / "gpu.md").read_text()
    for expected in (
        "| correctness, step, memory, threshold, train | a card |",
        "| 0123456789ab |",
        "| 3.00 | 800 |",
        "| mask pass + cuBLAS / auto, M = 2048: worst of 1, 4096 x 4096, M = 2048 | 1.500 [1.500, 1.500] x |",
        "| cuda layouts | measured | 7 | 0 | 1 |",
        "- 2 warnings (cuda layouts)",
        "### step 4096 x 4096\n",
        "| M = 8192 | not measured | not measured |",
        "100 (q), 100 %, 50 / 60 |",
        "- fused: nobody asked",
        "- paper's layer was not captured: its host code cannot be captured",
        "| M = 2048 | 3.0 MB, 50 % |",
        "### threshold bfloat16, 4096 x 4096",
        "| 20.5 [20, 21], 1,500.0 MB |",
    ):
        assert expected in text, expected
    stored = json.loads((tmp_path / "gpu-step.json").read_text())
    assert stored["environment"]["device"] == "a card"
    assert [case["status"] for case in stored["cases"]] == [MEASURED, NOT_MEASURED]
    assert stored["cases"][0]["samples"][AUTO]["ms"] == {"median": 1.0, "low": 1.0, "high": 1.0}
