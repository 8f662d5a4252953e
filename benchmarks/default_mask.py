"""Search the default mask on validation: three texts, after 24, 64 and 256 steps.

    python -m benchmarks.default_mask [--text chats] [--steps 24] [--out runs/default-mask]     hours on two cores
    python -m benchmarks.default_mask --table benchmarks/results/default-mask

Each run is `mft train` on SmolLM2-135M-Instruct with 4 rows of 128 tokens per step; no test split is opened. The chats
are those of the tutorial. A run that is there is not repeated. --table writes .json and .md and keeps the runs that the
.json has already.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

from mft.files.atomic import write_whole

from .tables import markdown

MODEL = "model.name=smollm2-135m data.sequence_length=128 data.max_eval_tokens=8192 train.batch_size=4 memory=in_place"
TEXTS = {
    "stdlib": "data.source=stdlib data.max_train_tokens=131072",
    "chats": "data.source=chats.jsonl",
    "headers": "data.source=headers data.max_train_tokens=131072",
}
STEPS = (24, 64, 256)
_VALUE = "mask.mode=value train.betas=[0,0.99] train.warmup_ratio=0.05"
SETTINGS = {
    "1 % of each matrix, by magnitude, 3e-4": (
        "mask.keep_ratio=0.99 train.lr=3e-4 train.betas=[0.9,0.999] train.warmup_ratio=0.03"
    ),
    "every score below 0, 5e-4": f"mask.threshold=0 {_VALUE} train.lr=5e-4",
    "every score below 0, 1e-3": f"mask.threshold=0 {_VALUE} train.lr=1e-3",
    "6 layers, every score below 0, 1e-3": f"mask.layers_to_transform=24-29 mask.threshold=0 {_VALUE} train.lr=1e-3",
} | {
    f"{'exactly' if fill else 'at most'} {100 * share:g} %, {rate}": (
        f"mask.budget={share} mask.fill_budget={str(fill).lower()} {_VALUE} train.lr={rate}"
    )
    for share, fill, rate in (
        (0.012, True, "3e-3"),
        (0.012, False, "1e-3"),
        (0.02, False, "1e-3"),
        (0.03, False, "1e-3"),
        (0.03, False, "7e-4"),
        (0.03, False, "5e-4"),
    )
}


def train(out: Path, setting: str, text: str, steps: int) -> None:
    """Run mft train unless its result is there."""
    directory = out / name_of(setting, text, steps)
    if not (directory / "table.json").exists():
        keys = f"{MODEL} {TEXTS[text]} {SETTINGS[setting]} train.steps={steps} output_dir={directory.name}"
        subprocess.run([sys.executable, "-m", "mft", "train", *keys.split(), "--overwrite"], cwd=out, check=True)


def name_of(setting: str, text: str, steps: int) -> str:
    return re.sub(r"[^a-z0-9.-]+", "-", f"{text} {steps} {setting}")


def write_chats(directory: Path) -> None:
    """Write chats.jsonl by the code of the tutorial."""
    page = (Path(__file__).parents[1] / "docs/tutorials/first-mask.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "chats.jsonl" in block)
    subprocess.run([sys.executable, "-c", code], cwd=directory, check=True, stdout=subprocess.DEVNULL)


def result_of(directory: Path) -> dict[str, float]:
    """Return the change of the validation loss with its standard error, the dropped share, and the file's bytes."""
    table = json.loads((directory / "table.json").read_text())
    steps = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines() if '"lr"' in line]
    return {
        "base": table["before"]["loss"],
        "change": table["loss after - before"],
        "standard error": table["standard error"],
        "dropped": steps[-1].get("dropped", 0.01),
        "bytes": (directory / "masks" / "adapter_model.safetensors").stat().st_size,
    }


def write_table(out: Path, target: Path) -> None:
    """Write target.json, which keeps what it has, and target.md."""
    path = target.with_suffix(".json")
    found = json.loads(path.read_text()) if path.exists() else {}
    for setting in SETTINGS:
        for text in TEXTS:
            for steps in STEPS:
                directory = out / name_of(setting, text, steps)
                if (directory / "table.json").exists():
                    found.setdefault(setting, {}).setdefault(text, {})[str(steps)] = result_of(directory)
    write_whole(path, json.dumps(found, indent=1) + "\n")
    columns = [(text, steps) for text in TEXTS for steps in STEPS]
    rows = []
    for setting, texts in found.items():
        cells = [texts.get(text, {}).get(str(steps)) for text, steps in columns]
        shown = ["" if one is None else f"{one['change']:+.3f} ({100 * one['dropped']:.2g} %)" for one in cells]
        rows.append([setting, *shown])
    intro = "Validation loss less the base's, nats per token; in brackets the dropped share of the masked weights."
    intro += f" Standard errors are in {path.name}. SmolLM2-135M-Instruct, 4 rows of 128 tokens per step, one seed."
    head = ["mask, rate", *(f"{text}, {steps} steps" for text, steps in columns)]
    write_whole(target.with_suffix(".md"), f"# The default mask\n\n{intro}\n\n{markdown(head, rows)}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", choices=TEXTS, action="append", help="only this text; may be repeated")
    parser.add_argument("--steps", type=int, choices=STEPS, action="append", help="only so many; may be repeated")
    parser.add_argument("--out", type=Path, default=Path("runs/default-mask"))
    parser.add_argument("--table", type=Path, help="write what was found to TABLE.json and TABLE.md, and run nothing")
    given = parser.parse_args()
    if given.table is not None:
        write_table(given.out, given.table)
        return
    given.out.mkdir(parents=True, exist_ok=True)
    if not (given.out / "chats.jsonl").exists():
        write_chats(given.out)
    for steps in given.steps or STEPS:
        for setting in SETTINGS:
            for text in given.text or TEXTS:
                train(given.out, setting, text, steps)


if __name__ == "__main__":
    main()
