"""The GPU suite's conclusions from its records: failures, goals, and gpu.md."""

import pytest

pytest.importorskip("triton", reason="the GPU suite measures Triton kernels")

from gpu_records import HERE, check, documents_of, record, results_of, sample, step

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import report
from benchmarks.gpu.cases import DENSE, FUSED, Case
from benchmarks.gpu.goals import MET, NOT_MET
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


def test_what_failed_comes_first():
    text = report.text(
        documents_of(
            check("exact", FAILED, passed=7, failed=1, complaints=["masked_linear: 3 elements differ"]),
            record("step", 2048, {DENSE: sample(1.0)}) | {"status": FAILED, "failures": {FUSED: "wrong: 0.5"}},
        )
    )
    first, then, *_ = text.split("## ")[1:]
    for line in (
        "correctness exact: masked_linear: 3 elements differ",
        "step 4096 x 4096, M = 2048: fused: wrong: 0.5",
    ):
        assert f"- {line}\n" in first
    assert then.startswith("Goals")
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


# ---------------------------------------------------------------------------------------------- tables
