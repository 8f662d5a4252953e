"""Make a kernel for the Hugging Face Kernel Hub from what setup.py has built: python -m building.hub_kernel [FOLDER].

Nothing is compiled. The libraries define their ops in any namespace that they are given (csrc/registration.h), so the
Hub gets exactly the files that were tested. A variant and its ops are named after its contents.
docs/how-to/kernel-hub.md says what is in the folder.
"""

import ast
import base64
import hashlib
import json
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from . import cpu, cuda
from .compile import CannotBuild

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mft_kernels"
FOLDER = ROOT / "build" / "hub-kernel"
INIT, OPS, REPORT = "__init__.py", "_ops.py", "_build.json"
NAMESPACE = "ops = torch.ops.mft\n"  # the line of _ops.py that sets the namespace
MANYLINUX, PYTHON = "manylinux_2_28", "3.9"  # the Hub's requirements for a library
LIBRARIES = {"cpu": cpu.LIBRARY, "cuda": cuda.LIBRARY}
# The version is that of the interface, and of the branch on the Hub; 0: it may still change.
# ABI is the oldest torch that serves, that of compile.TORCH_TARGET.
NAME, VERSION, LICENSE, ABI = "mft-kernels", 0, "Apache-2.0", "2.11"


def make(folder: Path = FOLDER, package: Path = PACKAGE) -> list[Path]:
    """Write a variant for each backend that has a library. Returns their folders.

    Raises: CannotBuild if the CPU library is missing, which every variant has.
    """
    report = json.loads((package / REPORT).read_text()) if (package / REPORT).exists() else {}
    if not report.get("cpu", {}).get("built"):
        reason = report.get("cpu", {}).get("reason") or "setup.py has not run"
        raise CannotBuild(f"{cpu.LIBRARY} must be built first: {reason}; pip install --no-build-isolation -e .")
    for old in (folder / "build").glob("torch-stable-abi*"):
        shutil.rmtree(old)
    backends = [backend for backend in LIBRARIES if report.get(backend, {}).get("built")]
    return [_make_variant(folder / "build", package, backend, report) for backend in backends]


def _make_variant(folder: Path, package: Path, backend: str, report: dict) -> Path:
    parts = [part for part in LIBRARIES if part in ("cpu", backend)]
    texts = _python(package)
    texts[REPORT] = json.dumps({part: _told(part, parts, report) for part in LIBRARIES}, indent=2) + "\n"
    files = {name: text.encode() for name, text in texts.items()}
    files |= {LIBRARIES[part]: (package / LIBRARIES[part]).read_bytes() for part in parts}

    contents = hashlib.sha256()
    for name in sorted(files):
        contents.update(f"{name} {len(files[name])}\n".encode() + files[name])
    own_name = f"_{NAME.replace('-', '_')}_{backend}_{contents.hexdigest()[:7]}"
    if NAMESPACE not in texts[OPS]:
        raise CannotBuild(f"{package / OPS} must have the line {NAMESPACE.strip()!r}")
    files[OPS] = texts[OPS].replace(NAMESPACE, NAMESPACE.replace("mft", own_name)).encode()

    archs = _archs(report["cuda"]["targets"]) if backend == "cuda" else None
    metadata = {
        "name": NAME,
        "id": own_name,
        "version": VERSION,
        "license": LICENSE,
        "python-depends": [],
        "kernel-depends": [],
        "backend": {"type": backend, **({"archs": archs} if archs else {})},
        "digest": {"algorithm": "sha256", "files": {name: _digest(files[name]) for name in sorted(files)}},
    }
    files["metadata.json"] = (json.dumps(metadata, indent=2) + "\n").encode()

    computes = "cpu" if backend == "cpu" else f"cu{_cuda_version(report)}"
    variant = folder / f"torch-stable-abi{ABI.replace('.', '')}-{computes}-{platform.machine()}-linux"
    for name, content in files.items():
        (variant / name).parent.mkdir(parents=True, exist_ok=True)
        (variant / name).write_bytes(content)
    return variant


def _python(package: Path) -> dict[str, str]:
    """Return {name: text} of the kernel's Python files: its own __init__.py, and what that imports from the package."""
    texts: dict[str, str] = {}
    waiting = {INIT: ROOT / "torch-ext" / package.name / INIT}
    while waiting:
        name, path = waiting.popitem()
        texts[name] = path.read_text()
        found = [(folder / INIT).as_posix() for folder in Path(name).parents[:-1]]
        for imported in _imported(texts[name], Path(name).parent):
            found += [f"{imported}.py", f"{imported}/{INIT}"]
        waiting |= {other: package / other for other in found if other not in texts and (package / other).exists()}
    return texts


def _imported(text: str, folder: Path) -> Iterator[str]:
    """Yield what a file in ``folder`` of the package may import from it, as paths without a suffix."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = folder
            for _ in range(node.level - 1):
                base = base.parent
            base = base.joinpath(*(node.module or "").split("."))
            found = [base, *(base / alias.name for alias in node.names)]
            yield from (path.as_posix() for path in found if path != Path("."))  # the kernel already has an __init__.py


def _told(part: str, parts: list[str], report: dict) -> dict:
    """Return backend_report()'s entry for a library in the kernel: what holds on any machine of setup.py's report."""
    if part not in parts:
        return {"built": False, "reason": "this variant of the kernel is without it"}
    return {"built": True, "reason": None, "left_out": report.get(part, {}).get("left_out", {})}


def _archs(targets: list[str]) -> list[str]:
    """Return ["8.0+PTX", "9.0"] for ["sm_80", "sm_90", "compute_80"]."""
    numbers = {target.partition("_")[2] for target in targets}
    later = {target.partition("_")[2] for target in targets if target.startswith("compute_")}
    return [f"{n[:-1]}.{n[-1]}{'+PTX' if n in later else ''}" for n in sorted(numbers, key=int)]


def _cuda_version(report: dict) -> str:
    """Return "130", from the nvcc that made the library. torch's may be newer, of the same major version."""
    return "".join(re.findall(r"\d+", report["cuda"]["ptxas"])[:2])


def _digest(content: bytes) -> str:
    return base64.b64encode(hashlib.sha256(content).digest()).decode()


def abi_faults(library: Path) -> list[str] | None:
    """Return what ``library`` needs and a kernel must not, by the Hub's checker; None if that is not installed."""
    try:
        from kernel_abi_check import ObjectFile
    except ImportError:
        return None
    checked = ObjectFile(library)
    found = [f"{symbol.name} ({symbol.dep} {symbol.version})" for symbol in checked.check_manylinux(MANYLINUX)]
    return [*found, *(f"{symbol.name} (Python)" for symbol in checked.check_python_abi(PYTHON))]


def main() -> None:
    """Make the folder, print where its variants are, and whether the Hub's checker finds faults in their libraries."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    try:
        made = make(folder)
    except CannotBuild as reason:
        sys.exit(f"mft_kernels: {reason}")
    for variant in made:
        print(f"{variant}: torch.ops.{json.loads((variant / 'metadata.json').read_text())['id']}")
        for library in sorted(variant.glob("*.so")):
            faults = abi_faults(library)
            told = "not checked: pip install kernel-abi-check" if faults is None else ", ".join(faults) or "kept"
            print(f"  {library.name}: {MANYLINUX} and Python {PYTHON}: {told}")


if __name__ == "__main__":
    main()
