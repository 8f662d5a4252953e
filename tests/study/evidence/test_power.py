"""The differences that a study can show, stated before it begins: by formula, by simulation, and from a result."""

import math

import numpy as np
import pytest
import torch
from tiny_study import make_study

from mft.evaluation.evaluate import Evaluation
from mft_study.evidence.power import (
    SMALL_HEADERS,
    SMOLLM2_CODE,
    UNKNOWN,
    Spread,
    power_lines,
    shortage_lines,
    smallest_difference,
    spread_in,
)
from mft_study.evidence.sums import Sums, write_sums
from mft_study.outcome import Measured
from mft_study.report.statistics import Paired, differences

KNOWN = Spread(0.003, 0.02, "a test")


@pytest.mark.parametrize(
    ("spread", "seeds", "documents", "expected"),
    [
        (SMALL_HEADERS, 10, 194, 0.0050),
        (SMOLLM2_CODE, 3, 510, 0.0055),
        (SMALL_HEADERS, 3, 128, 0.0096),  # 0.0076 by normal quantiles: 3 seeds leave 4.6 degrees of freedom
        (SMALL_HEADERS, 1, 128, math.inf),
        (SMALL_HEADERS, 3, 1, math.inf),
    ],
)
def test_the_smallest_difference_is_that_of_the_formula(spread, seeds, documents, expected):
    assert smallest_difference(spread, seeds, documents) == pytest.approx(expected, rel=0.08)


@pytest.mark.parametrize(("seeds", "documents"), [(3, 40), (5, 40)])
def test_four_of_five_simulated_studies_show_it(seeds, documents):
    least, generator = smallest_difference(KNOWN, seeds, documents), np.random.default_rng(0)
    x = least + KNOWN.seeds * generator.standard_normal((300, seeds, 1))
    x = x + KNOWN.documents * generator.standard_normal((300, 1, documents))
    found = differences([Paired(one, np.ones(documents)) for one in x], draws=1000)
    assert 0.70 < np.mean([difference.p < 0.05 for difference in found]) < 0.88


def sums_of(seeds=6, documents=400):
    """Return the sums of two arms whose difference varies as in KNOWN, and of one arm tested with a single seed."""
    generator, tokens = np.random.default_rng(1), torch.full((documents,), 200.0, dtype=torch.float64)
    easy = torch.tensor(generator.normal(3, 0.5, documents))
    sums, of_documents = Sums(), torch.tensor(generator.normal(0, KNOWN.documents, documents))

    def measured(loss):
        return Measured(Evaluation(torch.arange(documents), tokens, (easy + loss) * tokens, torch.zeros(documents)))

    sums.add("code/test/code", "MFT", {s: measured(torch.zeros(documents)) for s in range(seeds)}, {})
    shifts = generator.normal(0, KNOWN.seeds, seeds)
    sums.add("code/test/code", "LoRA", {s: measured(of_documents + shifts[s]) for s in range(seeds)}, {})
    sums.add("code/test/code", "one", {0: measured(of_documents)}, {})
    return sums, shifts.std(ddof=1)


def test_an_earlier_result_tells_how_much_differences_vary():
    sums, over_seeds = sums_of()
    found = spread_in(sums, "code", ["MFT", "LoRA", "one", "not there"])
    assert found.seeds == pytest.approx(over_seeds, rel=0.01)
    assert found.documents == pytest.approx(KNOWN.documents, rel=0.1)
    assert spread_in(sums, "code", ["MFT", "one"]) is None


def test_a_study_takes_its_own_earlier_result_or_that_of_the_same_model_and_text(tmp_path):
    study = make_study(tmp_path, overrides=["seeds=[0,1,2]"])
    (line,) = power_lines(study, {"count": 40}, tmp_path)
    assert line.startswith("count: 3 seeds and 40 test documents can show a difference of 0.0")
    assert UNKNOWN.source in line
    study.domains["count"].source, study.model.name = "stdlib", "smollm2-135m"
    assert SMOLLM2_CODE.source in power_lines(study, {"count": 40}, tmp_path)[0]
    held = {name.replace("code", "count"): array for name, array in sums_of()[0].arrays.items()}
    held |= {name.replace("LoRA", "control"): array for name, array in held.items() if "LoRA" in name}
    write_sums(Sums(held), tmp_path / "sums.npz")
    assert "vary by 0.00" in (line := power_lines(study, {"count": 40}, tmp_path)[0])
    assert "as for the 1 pairs of tuned arms in its earlier sums.npz" in line


@pytest.mark.parametrize(
    ("seeds", "documents", "lacks"),
    [
        ("[0,1]", 20, None),
        ("[0,1]", 19, "19 test documents, at least 20 are needed"),
        ("[0]", 40, "a single seed, at least 2 are needed, better 3"),
    ],
)
def test_a_study_that_can_conclude_nothing_is_told_what_it_lacks(tmp_path, seeds, documents, lacks):
    study = make_study(tmp_path, overrides=[f"seeds={seeds}"])
    said, power = shortage_lines(study, {"count": documents}), power_lines(study, {"count": documents}, tmp_path)
    assert (len(said), len(power)) == ((1, 0) if lacks else (0, 1))
    if lacks:
        assert said[0].startswith(f"Nothing will be concluded on count: {lacks}. Stop now (Ctrl-C) and give more")
