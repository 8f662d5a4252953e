"""The GPU suite's conclusions from its records: failures, and gpu.md."""

import pytest

pytest.importorskip("triton", reason="the GPU suite measures Triton kernels")

from gpu_records import HERE, check, documents_of, record, results_of, sample

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import report
from benchmarks.gpu.cases import DENSE, FUSED, Case
from benchmarks.gpu.results import FAILED, MEASURED, NOT_MEASURED


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
    assert then.startswith("Where")
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
