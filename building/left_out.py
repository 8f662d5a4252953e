"""python -m building.left_out: print what this checkout was built without, which pip does not show."""

import json
from collections import defaultdict
from pathlib import Path

REPORT = Path(__file__).parent.parent / "mft_kernels" / "_build.json"


def lines(report: dict[str, dict]) -> list[str]:
    """Return a line for each reason why a library, or kernels of one, are missing."""
    found = [f"without libmft_{part}.so: {entry['reason']}" for part, entry in report.items() if not entry["built"]]
    names = defaultdict(list)
    for entry in report.values():
        for name, reason in entry.get("left_out", {}).items():
            names[reason].append(name)
    found += [f"without {' and '.join(some)} (general kernels only): {reason}" for reason, some in names.items()]
    if found and not any("make cuda" in line for line in found):
        found.append("make cuda completes the CUDA library: it fetches what is missing, and builds")
    return found


if __name__ == "__main__":
    for line in lines(json.loads(REPORT.read_text())):
        print(f"mft_kernels: {line}")
