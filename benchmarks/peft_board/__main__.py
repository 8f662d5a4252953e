"""Run an entry of PEFT's own method comparison: its training script, unchanged, with masks registered as a method.

    git clone https://github.com/huggingface/peft
    python -m benchmarks.peft_board peft mft/llama-3.2-3B-budget0.006            # on a GPU, as PEFT runs its entries
    python -m benchmarks.peft_board peft mft/smollm2-135M-budget0.006 --small    # a small model, without network or GPU

An entry is a folder of benchmarks/peft_board/experiments with the files that PEFT needs: adapter_config.json and
training_params.json. PEFT's folder method_comparison/MetaMathQA is first copied into --out, so the checkout does not
change. PEFT's script writes its results to the usual place, below --out.

--small replaces what is not available offline: the model by SmolLM2-135M-Instruct, the training and test questions by
short problems with exact answers, the text for forgetting by Python files. Its figures show that an entry runs and how
two entries compare there. They cannot be compared with PEFT's board.
"""

import argparse
import runpy
import shutil
import sys
from pathlib import Path

from . import small_data

HERE = Path(__file__).parent
SUITE = Path("method_comparison") / "MetaMathQA"


def main(arguments: list[str] | None = None) -> None:
    """Copy PEFT's suite with our entries, and run one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("peft", type=Path, help="a checkout of PEFT's repository")
    parser.add_argument("entry", help="method/name below benchmarks/peft_board/experiments")
    parser.add_argument("--small", action="store_true", help="a small model and local data, also on a CPU")
    parser.add_argument("--out", type=Path, default=Path("runs/peft-board"), help="where the suite is copied to")
    asked = parser.parse_args(arguments)
    suite = copy_suite(asked.peft, asked.entry, asked.out)
    sys.path.insert(0, str(suite))
    import mft.masks.peft  # noqa: F401  (registers the method "MFT")

    if asked.small:
        small_data.install(suite)
    sys.argv = ["run.py", "--verbose", f"experiments/{asked.entry}"]
    with small_data.inside(suite):
        runpy.run_path("run.py", run_name="__main__")


def copy_suite(checkout: Path, entry: str, out: Path) -> Path:
    """Copy PEFT's suite with our entries below ``out``. Raises: SystemExit if there is no such checkout or entry."""
    if not (checkout / SUITE / "run.py").is_file():
        sys.exit(f"error: peft must be a checkout of PEFT's repository, which has {SUITE}/run.py, got {checkout}")
    ours = HERE / "experiments"
    entries = sorted(path.parent.relative_to(ours).as_posix() for path in ours.rglob("adapter_config.json"))
    if entry not in entries:
        sys.exit(f"error: entry must be one of {', '.join(entries)}, got {entry}")
    suite = (out / "MetaMathQA").resolve()
    shutil.copytree(
        checkout / SUITE, suite, dirs_exist_ok=True, ignore=shutil.ignore_patterns("results", "experiments")
    )
    for folder in ("results", "temporary_results", "cancelled_results"):
        (suite / folder).mkdir(exist_ok=True)
    shutil.copytree(ours, suite / "experiments", dirs_exist_ok=True)
    return suite


if __name__ == "__main__":
    main()
