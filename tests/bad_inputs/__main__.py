"""Print the page of errors: run every case and write down its message."""

import sys

from .registry import ACCEPTED, REFUSED
from .report import report

if __name__ == "__main__":
    sys.stdout.write(report())
    print(f"{len(REFUSED)} refused, {len(ACCEPTED)} accepted", file=sys.stderr)
