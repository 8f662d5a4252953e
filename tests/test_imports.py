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
    *("reference", "backends", "ops", "mask", "layers", "optim", "internal"),
)
STOREYS = {  # the lowest first, as docs/reference/map.md tells them from the top
    "inputs": (
        *("mft.checks", "mft.contention", "mft.escaping", "mft.files", "mft.number_formats", "mft.quantizers"),
        *("mft.config", "mft.config_file", "mft.memory"),
    ),
    "models": ("mft.data", "mft.models", "mft.masks"),
    "learning": ("mft.objectives", "mft.engines", "mft.importance", "mft.evaluation"),
    "runs": ("mft.tracking", "mft.training", "mft.rewards"),
    "lab": ("mft_study", "mft_study.report"),
    "faces": ("mft.publishing", "mft.patching", "mft.serving", "mft.vllm", "mft.cli", "mft_study.cli", "mft.__main__"),
}
ORDERS = {
    (ROOT, "mft_kernels"): [f"mft_kernels.{name}" for name in KERNEL_ORDER],
    (ROOT / "python", "mft", "mft_study"): [name for packages in STOREYS.values() for name in packages],
}
BACKENDS = ("cpu", "cuda", "triton")  # packages of mft_kernels/backends, none of which imports another
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


def modules_of(root: Path, *packages: str) -> dict[str, Path]:
    """Return {dotted name: file} of all modules below these folders of root. A folder's name means its __init__.py."""
    found = {}
    for path in sorted(path for package in packages for path in (root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: path for name, path in found.items() if "." in name}


def imported_modules(path: Path, root: Path, modules: Collection[str]) -> set[str]:
    """Return those of ``modules`` that a file below root imports anywhere."""
    inside, found = path.relative_to(root).parent.parts, set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = inside[: len(inside) + 1 - node.level] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            found |= {module} if node.module else set()
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found & set(modules)


def faults(root: Path, packages: Sequence[str], order: Sequence[str]) -> list[str]:
    """Return every import of a package that is later in ``order``, and every import circle inside one package."""
    modules = modules_of(root, *packages)
    known = {name: imported_modules(path, root, modules) for name, path in modules.items()}
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


@pytest.mark.parametrize("where", ORDERS, ids=lambda where: where[1])
def test_packages_import_downward_and_in_no_circle(where):
    root, *packages = where
    assert faults(root, packages, ORDERS[where]) == []


def test_the_recipe_names_the_lab_in_no_file():
    """The command line finds the lab's verbs by entry points."""
    for path in (ROOT / "python" / "mft").rglob("*.py"):
        assert "mft_study" not in others_of(path, "mft"), path


def test_a_backend_knows_no_other():
    modules = modules_of(ROOT, "mft_kernels")
    folders = {backend: f"mft_kernels.backends.{backend}" for backend in BACKENDS}
    for name, path in modules.items():
        for backend, folder in folders.items():
            if f"{name}.".startswith(f"{folder}."):
                others = tuple(other for other in folders.values() if other != folder)
                assert not [known for known in imported_modules(path, ROOT, modules) if known.startswith(others)], (
                    backend
                )


def test_the_kernel_package_names_itself_by_dots_alone():
    """The Kernel Hub loads it under another name (docs/how-to/kernel-hub.md)."""
    for path in (ROOT / "mft_kernels").rglob("*.py"):
        assert "mft_kernels" not in others_of(path, ""), path


def test_the_recipe_takes_private_names_of_the_kernels_from_their_internal_page_alone():
    used = set()
    for path in (ROOT / "python").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not [alias.name for alias in node.names if alias.name.startswith("mft_kernels.")], path
            elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "mft_kernels":
                assert node.module in ("mft_kernels", "mft_kernels.internal"), path
                used |= {alias.name for alias in node.names if node.module == "mft_kernels.internal"}
    page = ast.parse((ROOT / "mft_kernels" / "internal.py").read_text())
    listed = {alias.name for node in page.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert used == listed


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
    found = faults(tmp_path, ("p",), ("p.low", "p.high"))
    upward = ["p.low.d imports p.high.e", "p.low.f imports p.high.e"]
    assert found[:3] == ["p.new stands in no package of the order", *upward]
    assert len(found) == 4
    assert found[3].startswith("a circle: p.low.")


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
