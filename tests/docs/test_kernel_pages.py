"""Compare the pages of the kernels with the sources: the steps of the drawing, and the named files and functions."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: By page: where the names on it must occur.
SOURCES = {
    "kernels.md": ("csrc", "mft_kernels"),
    "cpu-kernels.md": ("csrc",),
    "triton-kernels.md": ("mft_kernels", "csrc", "building"),
    "cuda-kernels.md": ("csrc", "mft_kernels"),
}
PAGES = {name: (ROOT / "docs" / "explanation" / name).read_text() for name in SOURCES}
FILE = re.compile(r"(?:mft_kernels|csrc)/[\w/]+\.\w+")
STEPS = [line for line in PAGES["kernels.md"].splitlines() if line.startswith("    ") and FILE.search(line)]
LABEL = re.compile(r"^.*?(?<!:):(?!:)")  # "cpu:" and other labels before a call


@pytest.fixture(scope="module")
def texts():
    """Return the text of each folder of sources, by file."""
    folders = {folder for named in SOURCES.values() for folder in named}
    built = {".so", ".pyc"}
    return {
        folder: {path: path.read_text() for path in (ROOT / folder).rglob("*.*") if path.suffix not in built}
        for folder in folders
    }


def named(step):
    """Return what a step calls: all words before its files, without a label."""
    return re.findall(r"[A-Za-z_][\w.:]*", LABEL.sub("", FILE.split(step)[0]))


def test_the_drawing_leads_from_the_layer_to_the_inner_loop_of_each_backend():
    assert named(STEPS[0]) == ["MaskedLinear.forward"]
    called = [name for step in STEPS for name in named(step)]
    assert {"add_product", "product_tile", "multiply_16x8x16"} <= set(called)
    assert all(named(step) for step in STEPS)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: f"{named(step)[0]}-{FILE.search(step)[0]}")
def test_what_a_step_calls_is_in_its_files(step):
    sources = "".join((ROOT / name).read_text() for name in FILE.findall(step))
    for name in named(step):
        assert all(re.search(rf"\b{part}\b", sources) for part in re.split(r"\.|::", name)), name


@pytest.mark.parametrize("page", PAGES)
def test_the_files_and_functions_of_its_text_exist(page, texts):
    found = {path: text for folder in SOURCES[page] for path, text in texts[folder].items()}
    files, everywhere = {path.name for path in found}, "".join(found.values())
    for name in re.findall(r"`(\w+\.(?:cpp|cuh?|inl|h|py))`", PAGES[page]):
        assert name in files, name
    for name in re.findall(r"`([a-z]+_\w+|k[A-Z]\w+|[A-Z][a-z]+[A-Z]\w+)`", PAGES[page]):
        assert re.search(rf"\b{name}\b", everywhere), name
