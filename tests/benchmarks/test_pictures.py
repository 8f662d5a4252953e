"""Every stored picture can be drawn again, and from a result that is stored."""

from benchmarks.pictures import MEASURED, STUDIES
from benchmarks.records import RESULTS


def test_each_stored_picture_has_a_stored_source():
    drawn = {f"{name}.png" for name in STUDIES} | {"cpu.png", "memory.png"}
    drawn |= {
        f"{path.name.replace('-cpu-', '-')[:-5]}.png" for q in MEASURED for path in RESULTS.glob(f"{q}-cpu-*.json")
    }
    assert {path.name for path in RESULTS.glob("*.png")} == drawn
    assert [study for study, _ in STUDIES.values() if not (RESULTS / f"{study}.json").is_file()] == []
