"""python -m building.requirements EXTRA...: print the packages of extras of pyproject.toml, one per line, for pip."""

import sys
import tomllib
from pathlib import Path


def requirements(*extras: str) -> list[str]:
    """Return the packages under the extras in pyproject.toml, without the package itself."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    listed = [package for extra in extras for package in project["optional-dependencies"][extra]]
    return [package for package in listed if not package.startswith(f"{project['name']}[")]


if __name__ == "__main__":
    print("\n".join(requirements(*sys.argv[1:])))
