"""docs/cpu-kernels.md against the sources: the files that it names exist, and what it names as theirs is in them."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "cpu-kernels.md").read_text()
FILE = re.compile(r"(?:mft_kernels|csrc)/[\w/]+\.\w+")
STEPS = [line for line in PAGE.splitlines() if line.startswith("    ") and FILE.search(line)]
NAME = re.compile(r"\w+_\w+|[A-Z][a-z]+(?:[A-Z][a-z]+|::\w+)[.\w]*")  # a_function, AClass.method, Class::method


def test_the_whole_way_has_its_steps():
    assert STEPS[0].split()[0] == "MaskedLinear.forward"
    assert any("add_product" in step for step in STEPS)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.split()[-1])
def test_what_a_step_calls_is_in_its_files(step):
    sources = "".join((ROOT / name).read_text() for name in FILE.findall(step))
    for name in NAME.findall(FILE.split(step)[0]):
        assert all(re.search(rf"\b{part}\b", sources) for part in re.split(r"\.|::", name)), name


def test_the_files_and_functions_of_its_text_exist():
    everywhere = "".join(path.read_text() for path in (ROOT / "csrc").rglob("*.*") if path.suffix != ".so")
    for name in re.findall(r"`(\w+\.(?:cpp|inl|h))`", PAGE):
        assert any((ROOT / "csrc").rglob(name)), name
    for name in re.findall(r"`([a-z]+_\w+|k[A-Z]\w+|Keep\w+)`", PAGE):
        assert re.search(rf"\b{name}\b", everywhere), name
