"""make architectures: takes minutes and writes results.csv. ONLY="falcon encoder": only these; other rows stay."""

import argparse
import gc
import sys
import warnings

import transformers
from rich.progress import track

from .attempts import attempt
from .rows import RESULTS, STATES, Row, read, write
from .sweeps import SWEEPS


def main() -> None:
    """Try the requested models, print those that are not converted, and write the rows."""
    names = [sweep.name for sweep in SWEEPS]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", nargs="*", help=f"model types, or sweeps: {', '.join(names)}, and causal/bert for both")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    tried = [
        (sweep, kind, make)
        for sweep in SWEEPS
        for kind, make in sweep.kinds().items()
        if not arguments.only or {sweep.name, kind, f"{sweep.name}/{kind}"} & set(arguments.only)
    ]
    if not tried:
        parser.error(f"no architecture or sweep is called {' or '.join(arguments.only)}")
    done: list[tuple[str, Row]] = []
    for sweep, kind, make in track(
        tried,
        "architectures",
    ):
        row = attempt(sweep, kind, make)
        done.append((sweep.name, row))
        gc.collect()  # models contain reference cycles
        if row.state != "converted":
            print(f"{row.state:>9}  {sweep.name}/{kind}: {row.words}", flush=True)
    rows = read() if arguments.only else {}
    for name, row in done:
        rows.setdefault(name, {})[row.kind] = row
    write(rows)
    counts = ", ".join(f"{sum(row.state == state for _, row in done)} {state}" for state in STATES)
    print(f"{counts} of {len(done)}: {RESULTS}")
    sys.exit(1 if any(row.state == "wrong" for _, row in done) else 0)


if __name__ == "__main__":
    main()
