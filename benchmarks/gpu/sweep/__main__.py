"""python -m benchmarks.gpu.sweep [gpu-sweep.json]: a stored sweep, judged by the plan of now."""

import json
import sys
from pathlib import Path

from ...records import RESULTS
from .measure import judge


def main(arguments: list[str]) -> int:
    """A line a product: regret of the choice, error of the model."""
    path = Path(arguments[0]) if arguments else RESULTS / "gpu-sweep.json"
    if not path.exists():
        print(f"no sweep in {path}: make gpu WHAT=sweep", file=sys.stderr)
        return 2
    for case in json.loads(path.read_text())["cases"]:
        if not case.get("configurations"):
            continue
        found = judge(case)
        regret, error = (
            "not known" if found[key] is None else f"{100 * found[key]:.1f} %" for key in ("regret", "error")
        )
        place = f"{case['detail']}, {case['n']} x {case['k']}, M = {case['m']}"
        print(f"{place}: regret {regret}, error of the model {error}, of {len(case['configurations'])} configurations")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
