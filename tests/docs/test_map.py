"""docs/reference/map.md names every existing package and every module of the kernels, and nothing else."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOT_OURS = {"build", "runs", "dist"}


def tables():
    """Return {folder: the names in the first column}, with "elsewhere" for the root."""
    found, rows = {}, []
    for line in (ROOT / "docs" / "reference" / "map.md").read_text().splitlines():
        if not line.startswith("|"):
            rows = None
        elif rows is None:
            head = line.split("|")[1]
            rows = found.setdefault("elsewhere" if "elsewhere" in head else re.search("`(.+?)/`", head)[1], [])
        else:
            rows += re.findall("`(.+?)`", line.split("|")[1])
    return found


def entries(folder):
    """Return Python files and folders as the map writes them."""
    paths = [p for p in folder.iterdir() if not p.name.startswith(("_", ".")) and not p.name.endswith(".egg-info")]
    return {f"{p.name}/" if p.is_dir() else p.name for p in paths if p.is_dir() or p.suffix == ".py"}


def test_the_map_names_every_package_and_module_of_both_and_no_other():
    recipe, kernels = (set(tables()[name]) for name in ("python/mft", "mft_kernels"))
    assert recipe == entries(ROOT / "python" / "mft") | {"mft_study/"}
    assert kernels == entries(ROOT / "mft_kernels")


def test_the_map_names_folders_that_there_are():
    for name in tables()["elsewhere"]:
        assert (ROOT / name).is_dir(), name
    named = {name.split("/")[0] for name in tables()["elsewhere"]} | {"python", "mft_kernels", "docs"}
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith((".", "_"))}
    assert {name for name in folders if not name.endswith(".egg-info")} - NOT_OURS <= named
