"""python -m building.wheel: write one wheel for every Python, torch and Linux, and its sdist, into dist/.

The wheel has both libraries with every group of kernels. auditwheel checks that they keep to manylinux_2_28 (glibc
2.28), and names the wheel accordingly.
"""

import argparse
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
PLATFORM = "manylinux_2_28_x86_64"
OF_TORCH = ("libtorch.so", "libtorch_cpu.so", "libc10.so")  # already loaded when the package is imported
LARGEST = 60_000_000  # bytes; PyPI accepts 100 MB per file


def build(dist: Path = DIST) -> tuple[Path, Path]:
    """Build (wheel, sdist) in an empty ``dist``. Raises: SystemExit if the wheel lacks kernels or is too large."""
    for folder in (dist, ROOT / "build" / "lib", *(ROOT / "build").glob("lib.*"), ROOT / "build" / "wheel"):
        shutil.rmtree(folder, ignore_errors=True)  # otherwise deleted files would be packed
    run([sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(dist)])
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
    run([*pip, "--wheel-dir", "build/wheel", "."])
    (built,) = (ROOT / "build" / "wheel").glob("*.whl")
    exclude = [argument for name in OF_TORCH for argument in ("--exclude", name)]
    audit = [sys.executable, "-m", "auditwheel", "repair", "--plat", PLATFORM, "--only-plat", *exclude]
    run([*audit, "--wheel-dir", str(dist), str(built)])
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    if found := faults(wheel):
        sys.exit("\n".join(found))
    return wheel, sdist


def faults(wheel: Path) -> list[str]:
    """Return why a wheel must not be published, one reason per line."""
    found = []
    if not wheel.name.endswith(f"-py3-none-{PLATFORM}.whl"):
        found.append(f"{wheel.name} must end in py3-none-{PLATFORM}: one for every Python")
    if (size := wheel.stat().st_size) > LARGEST:
        found.append(f"{wheel.name} must have at most {LARGEST:,} bytes, got {size:,}")
    with zipfile.ZipFile(wheel) as archive:
        report = json.loads(archive.read("mft_kernels/_build.json"))
    for part, entry in report.items():
        if not entry["built"]:
            found.append(f"{wheel.name} is without libmft_{part}.so: {entry['reason']}")
        found += [f"{wheel.name} is without {name}: {why}" for name, why in entry.get("left_out", {}).items()]
    return found


def run(command: list[str]) -> None:
    if code := subprocess.run(command, cwd=ROOT).returncode:
        sys.exit(code)


def main() -> None:
    """The command."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for path in build():
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
