"""python -m building.requirements EXTRA: the packages of an extra of pyproject.toml, a line each, for pip."""

import sys
import tomllib
from pathlib import Path


def requirements(extra: str) -> list[str]:
    """What pyproject.toml lists under the extra."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    return project["optional-dependencies"][extra]


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1])))
