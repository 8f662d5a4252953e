"""Check that imports run downward only: find each import in the sources that crosses a line of the architecture."""

import ast
import re
import subprocess
import sys
from collections.abc import Collection, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A package may import only the packages before it. Inside a package there is no order, but circles are forbidden.
KERNEL_ORDER = (
    *("_ops", "_version", "eager", "testing", "timing", "codes", "operands", "page_locked", "shards"),
    *("reference", "backends", "ops", "mask", "layers", "optim"),
)
BACKENDS = ("cpu", "cuda", "triton")  # packages of mft_kernels/backends, none of which imports another
RECIPE_ORDER = (
    *("checks", "contention", "escaping", "files", "number_formats", "config", "config_file", "memory", "data"),
    *("models", "budget", "surrogate", "masks", "federated", "objectives", "engines", "importance", "evaluation"),
    *("tracking", "training", "rewards", "publishing", "patching", "serving", "vllm", "study", "study.report", "cli"),
    "__main__",
)
EXTERNAL = {"torch", "triton", "numpy"}  # all that mft_kernels may import besides the standard library


def others_of(path: Path, package: str) -> set[str]:
    """Return the top-level names that a file imports anywhere, except ``package``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
    return found - {package}


def modules_of(folder: Path) -> dict[str, Path]:
    """Return {dotted name below the package: file}. A package's name means its __init__.py; the outermost's is ""."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported_modules(path: Path, folder: Path, modules: Collection[str]) -> set[str]:
    """Return those of ``modules`` that a file of the package in ``folder`` imports anywhere."""
    inside, found = path.relative_to(folder).parent.parts, set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = [folder.name, *inside][: len(inside) + 2 - node.level] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            found |= {module} if node.module else set()
            found |= {f"{module}.{alias.name}" for alias in node.names}
    prefix = f"{folder.name}."
    below = {name.removeprefix(prefix) for name in found if name.startswith(prefix)}  # the package vllm is not mft.vllm
    return {name for name in below if name in modules and name != ""}


def faults(folder: Path, order: Sequence[str]) -> list[str]:
    """Return every import of a package that is later in ``order``, and every import circle inside one package."""
    modules = modules_of(folder)
    known = {name: imported_modules(path, folder, modules) for name, path in modules.items() if name}
    home = {name: max((p for p in order if f"{name}.".startswith(f"{p}.")), key=len, default=None) for name in known}
    found = [f"{name} stands in no package of the order" for name in known if home[name] is None]
    rank = {name: len(order) if place is None else order.index(place) for name, place in home.items()}
    for name, below in known.items():
        found += [f"{name} imports {other}" for other in sorted(below) if rank[other] > rank[name]]
    for place in order:
        inside = {name: {o for o in below if home[o] == place} for name, below in known.items() if home[name] == place}
        try:
            TopologicalSorter(inside).prepare()
        except CycleError as error:
            found.append(f"a circle: {' imports '.join(reversed(error.args[1]))}")
    return found


@pytest.mark.parametrize(("folder", "order"), [("mft_kernels", KERNEL_ORDER), ("python/mft", RECIPE_ORDER)])
def test_packages_import_downward_and_in_no_circle(folder, order):
    assert faults(ROOT / folder, order) == []


def test_a_backend_knows_no_other():
    folder = ROOT / "mft_kernels"
    modules = modules_of(folder)
    for name, path in modules.items():
        room, _, place = name.partition(".")
        backend = place.partition(".")[0]
        if room == "backends" and backend in BACKENDS:
            known = imported_modules(path, folder, modules)
            assert not [
                other for other in known if other.startswith(tuple(f"backends.{o}" for o in BACKENDS if o != backend))
            ]


def test_the_kernel_package_names_itself_by_dots_alone():
    """The Kernel Hub loads it under another name (docs/how-to/kernel-hub.md)."""
    for path in (ROOT / "mft_kernels").rglob("*.py"):
        assert "mft_kernels" not in others_of(path, ""), path


def needed(path: Path) -> set[str]:
    """Return the top-level names that a test file imports at collection, except those of its importorskip calls."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names - set(re.findall(r'^(?:\w+ = )?pytest\.importorskip\("(\w+)"', path.read_text(), re.MULTILINE))


def test_tests_of_kernels_are_collected_where_pytest_torch_triton_and_numpy_are_all_there_is():
    """A lent GPU machine has only these packages. One import of another package stops pytest for the whole folder."""
    tests = ROOT / "tests"
    files = [
        path
        for name in ("ops", "kernels", "cpu_kernels", "cuda_kernels", "triton_kernels")
        for path in (tests / name).glob("*.py")
    ]
    ours = {path.stem: path for folder in {tests, *(path.parent for path in files)} for path in folder.glob("*.py")}
    ours["emulated"] = tests / "emulated" / "__init__.py"
    allowed = sys.stdlib_module_names | EXTERNAL | {"pytest", "mft_kernels", "building", "benchmarks"}
    seen: set[Path] = set()
    while files:
        path = files.pop()
        seen.add(path)
        names = needed(path)
        assert names <= allowed | ours.keys(), path
        files += [ours[name] for name in names - allowed if ours[name] not in seen]
    assert len(seen) > 40


def test_contributing_names_the_packages_in_their_order():
    packages = ", ".join(f"`{name}`" for name in RECIPE_ORDER if name not in ("study.report", "__main__"))
    assert f"{packages}." in " ".join((ROOT / "CONTRIBUTING.md").read_text().split())


def test_the_kernel_package_needs_torch_triton_and_numpy_alone():
    for path in (ROOT / "mft_kernels").rglob("*.py"):
        assert others_of(path, "mft_kernels") <= EXTERNAL | set(sys.stdlib_module_names), path


def test_a_line_crossed_between_packages_and_a_circle_inside_one_are_found(tmp_path):
    for name, text in {
        "low/a.py": "def f():\n    from p.low.b import g\n",
        "low/b.py": "from . import c\n",
        "low/c.py": "import p.low.a\n",
        "low/d.py": "from p.high.e import f\n",
        "low/f.py": "from ..high import e\n",
        "high/e.py": "from p.low.a import f\n",
        "new.py": "",
    }.items():
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "p" / name).write_text(text)
    found = faults(tmp_path / "p", ("low", "high"))
    assert found[:3] == ["new stands in no package of the order", "low.d imports high.e", "low.f imports high.e"]
    assert len(found) == 4
    assert found[3].startswith("a circle: low.")


def test_importing_the_kernels_loads_nothing_of_the_recipe():
    recipe = {"transformers", "datasets", "yaml", "typer", "matplotlib"}
    code = f"import sys, mft_kernels; loaded = {recipe} & sys.modules.keys(); assert not loaded, loaded"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_tests_import_helpers_of_their_own_folder_or_the_outermost_alone():
    """Helpers of another folder are found only if pytest has collected that folder before."""
    tests = ROOT / "tests"
    homes = {path.stem: path.parent for path in tests.rglob("*.py") if path.name not in ("conftest.py", "__init__.py")}
    for path in tests.rglob("*.py"):
        for name in others_of(path, "tests") & homes.keys():
            assert homes[name] in (tests, path.parent) or "bad_inputs" in homes[name].parts, f"{path} imports {name}"
