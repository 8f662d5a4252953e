"""Print the page of errors: every case is run, and what it said is written down."""

import sys

from .registry import ACCEPTED, REFUSED
from .report import report

if __name__ == "__main__":
    sys.stdout.write(report())
    print(f"{len(REFUSED)} refused, {len(ACCEPTED)} accepted", file=sys.stderr)
