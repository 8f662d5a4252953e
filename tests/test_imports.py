"""Imports run downward only: draws the lines of the architecture from the sources and fails when one is crossed."""

import ast
import re
import subprocess
import sys
from collections.abc import Collection, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent

# A module may import those on lines above its own, and none on its own line.
KERNEL_LAYERS = (
    ("_ops", "_version", "eager", "faster", "fixed_point", "processor", "reference", "testing", "timing"),
    ("linear_probe", "reference_grouped", "reference_quantized", "reference_step", "shells"),
    ("autotune", "backends", "built", "checks", "direct", "library", "maskable"),
    ("attention", "cpu_choice", "cpu_grouped", "cuda_grouped", "grouped_checks"),
    ("ops", "cpu", "cuda", "grouped", "many", "scores", "step", "triton"),
    ("companions", "quantized"),
    ("held", "masking", "optim"),
    ("grouped_held", "grouped_masking", "layers", "masked_layer"),
    ("grouped_linear", "linear"),
    ("__init__",),
)
TRITON_LAYERS = (
    ("cards", "language", "specialise"),
    ("cost", "cubins", "tiles"),
    ("target",),
    ("launch",),
    ("plan",),
    ("arguments", "choice"),
    ("experts", "planned", "product", "score_grad", "scratch"),
    ("backward", "bits", "grouped", "select"),
    ("many", "ops", "quantized", "score_step"),
    ("__init__",),
)
# Of mft_kernels: a kernel knows no sibling.
KERNELS_MAY_IMPORT = {
    "autotune",
    "backends",
    "built",
    "reference",
    "reference_grouped",
    "reference_quantized",
    "reference_step",
}
# Of mft: a package may import those before it. In a package there is no order, and no circle.
RECIPE_ORDER = (
    *("checks", "contention", "files", "config", "config_file", "memory", "data", "models", "surrogate", "masks"),
    *("objectives", "engines", "importance", "evaluation", "tracking", "training", "rewards", "publishing", "serving"),
    *("study", "study.report", "cli", "__main__"),
)
EXTERNAL = {"torch", "triton", "numpy"}  # all that mft_kernels may import besides the standard library


def imports(path: Path, package: str) -> tuple[set[str], set[str]]:
    """(modules of ``package``, top-level names of others) that a file imports, wherever in it.

    What comes from the package above is named with a dot before it.
    """
    own, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            names = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
            own |= {"." * (node.level - 1) + name for name in names}
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for name in names:
                if name.startswith(f"{package}."):
                    own.add(name.removeprefix(f"{package}.").split(".")[0])
                elif name == package and isinstance(node, ast.ImportFrom):
                    own |= {alias.name for alias in node.names}
                else:
                    others.add(name.split(".")[0])
    return own, others


def crossings(folder: Path, package: str, layers: tuple[tuple[str, ...], ...]) -> list[str]:
    """Every import that does not run downward, and every module that no layer names."""
    rank = {name: i for i, layer in enumerate(layers) for name in layer}
    found = []
    for path in sorted(folder.glob("*.py")):
        module = path.stem
        if module not in rank:
            found.append(f"{path.name} stands in no layer")
            continue
        for imported in imports(path, package)[0] & rank.keys():
            if rank[imported] >= rank[module]:
                found.append(f"{module} imports {imported}")
    return found


def test_the_kernel_package_imports_downward():
    assert crossings(ROOT / "mft_kernels", "mft_kernels", KERNEL_LAYERS) == []


def test_the_triton_kernels_import_downward_and_no_sibling():
    folder = ROOT / "mft_kernels" / "triton"
    assert crossings(folder, "mft_kernels.triton", TRITON_LAYERS) == []
    for path in folder.glob("*.py"):
        above = {name[1:] for name in imports(path, "mft_kernels.triton")[0] if name.startswith(".")}
        assert above <= KERNELS_MAY_IMPORT, path
        assert not any("mft_kernels" in name for name in imports(path, "mft_kernels.triton")[1]), path


def modules_of(folder: Path) -> dict[str, Path]:
    """{dotted name below the package: file}; a package's own name stands for its __init__.py, the outermost's is ""."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported_modules(path: Path, package: str, modules: Collection[str]) -> set[str]:
    """Those of ``modules`` that a file imports by their whole names, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level or path.name == "__init__.py", f"{path}: write the whole name"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    below = {name.removeprefix(f"{package}.") for name in found if name}
    return {name for name in below if name in modules and name != ""}


def faults(folder: Path, package: str, order: Sequence[str]) -> list[str]:
    """Every import of a package that comes later in ``order``, and every circle of modules inside one package."""
    modules = modules_of(folder)
    known = {name: imported_modules(path, package, modules) for name, path in modules.items() if name}
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


def test_the_recipe_imports_downward_and_in_no_circle():
    assert faults(ROOT / "python" / "mft", "mft", RECIPE_ORDER) == []


def needed(path: Path) -> set[str]:
    """Top-level names that a test file imports when it is collected, less those that it skips without."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names - set(re.findall(r'^(?:\w+ = )?pytest\.importorskip\("(\w+)"', path.read_text(), re.MULTILINE))


def test_tests_of_kernels_are_collected_where_pytest_torch_triton_and_numpy_are_all_there_is():
    """As on a machine that is lent; one import of another package stops pytest for the whole folder."""
    tests = ROOT / "tests"
    files = [
        path
        for name in ("kernels", "cpu_kernels", "cuda_kernels", "triton_kernels")
        for path in (tests / name).glob("*.py")
    ]
    ours = {path.stem: path for folder in {tests, *(path.parent for path in files)} for path in folder.glob("*.py")}
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
        _, others = imports(path, "mft_kernels")
        assert others <= EXTERNAL | set(sys.stdlib_module_names), path


def test_a_crossed_line_is_found(tmp_path):
    (tmp_path / "low.py").write_text("def f():\n    from .high import g\n")
    (tmp_path / "high.py").write_text("import kernels.low\nfrom kernels import low\n")
    (tmp_path / "new.py").write_text("")
    assert crossings(tmp_path, "kernels", (("low",), ("high",))) == ["low imports high", "new.py stands in no layer"]


def test_a_line_crossed_between_packages_and_a_circle_inside_one_are_found(tmp_path):
    for name, text in {
        "low/a.py": "def f():\n    from p.low.b import g\n",
        "low/b.py": "from p.low import c\n",
        "low/c.py": "import p.low.a\n",
        "low/d.py": "from p.high.e import f\n",
        "high/e.py": "from p.low.a import f\n",
        "new.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = faults(tmp_path, "p", ("low", "high"))
    assert found[:2] == ["new stands in no package of the order", "low.d imports high.e"]
    assert len(found) == 3
    assert found[2].startswith("a circle: low.")


def test_importing_the_kernels_loads_nothing_of_the_recipe():
    recipe = {"transformers", "datasets", "yaml", "typer", "matplotlib"}
    code = f"import sys, mft_kernels; loaded = {recipe} & sys.modules.keys(); assert not loaded, loaded"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_tests_import_helpers_of_their_own_folder_or_the_outermost_alone():
    """Another folder's are found only where pytest happens to have collected that folder before."""
    tests = ROOT / "tests"
    homes = {path.stem: path.parent for path in tests.rglob("*.py") if path.name not in ("conftest.py", "__init__.py")}
    for path in tests.rglob("*.py"):
        _, others = imports(path, "tests")
        for name in others & homes.keys():
            assert homes[name] in (tests, path.parent) or "bad_inputs" in homes[name].parts, f"{path} imports {name}"
