"""Every stored picture can be drawn again, and from a result that is stored."""

from benchmarks.pictures import STUDIES
from benchmarks.records import RESULTS


def test_each_stored_picture_has_a_stored_source():
    assert {path.stem for path in RESULTS.glob("*.png")} == set(STUDIES)
    assert [study for study, _ in STUDIES.values() if not (RESULTS / f"{study}.json").is_file()] == []
