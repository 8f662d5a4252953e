"""Write docs/reference/peft-methods.md: try every method of the installed PEFT on a tiny Llama (make peft-methods).

A method runs if it takes steps, if its trained weights give the same model again, and if the start keeps its weights.
"""

import dataclasses
import warnings
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from tiny import make_llama, make_rows

from mft.config import MaskConfig, TrainConfig
from mft_study.arms.adapters import Peft
from mft_study.arms.arm import Ground
from mft_study.arms.kinds import make_arm
from mft_study.arms.weights import clone_with_weights
from mft_study.peft_methods import MethodFailsError, methods

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "peft-methods.md"
MASK = MaskConfig.paper(layers_to_transform=[2, 3])
TRAIN = TrainConfig(lr=1e-2, steps=3, batch_size=4)
# Options that a method requires, or whose defaults are too large for layers of 16 to 64 numbers.
OPTIONS = {
    "C3A": {"block_size": 16},
    "FOURIERFT": {"n_frequency": 64},
    "MISS": {"r": 8},
    "PSOFT": {"r": 8},
    "ROAD": {"group_size": 16},
    "SHIRA": {"r": 4},
    "TRAINABLE_TOKENS": {"token_indices": [1, 2, 3]},
    "VBLORA": {"vector_length": 16, "num_vectors": 32},
    "WAVEFT": {"n_frequency": 64},
}
HEAD = """# Methods of PEFT in studies

The methods that an arm `{{kind: peft, config: {{peft_type: ...}}}}` of a study can use
([comparison.md](../how-to/comparison.md#any-method-of-peft)). `make peft-methods` writes this page: it tries every
method of PEFT {version} on the attention and MLP of two layers of a tiny Llama, once with weights in fp32 and once in
bf16, with PEFT's defaults and the options that are shown.

| column | means |
|---|---|
| numbers | that are trained there; LoRA of rank 1 trains 1024 |
| bf16 | whether it also runs with weights in bf16 |
| merges | whether its weights can be averaged and interpolated; if not, such an arm is a row with that reason |
"""


@dataclass(frozen=True)
class Row:
    """The result of trying a method."""

    method: str
    why_not: str = ""  # empty if it runs
    numbers: int = 0
    why_not_bf16: str = ""
    why_not_merged: str = ""


def attempt(method: str) -> Row:
    """Try a method that no study refuses."""
    arm = make_arm("peft", lrs=[1e-2], config={"peft_type": method} | OPTIONS.get(method, {}))
    assert isinstance(arm, Peft)
    row = Row(method)
    for dtype in (torch.bfloat16, torch.float32):
        try:
            numbers, why_not_merged = _tried(arm, dtype)
        except (MethodFailsError, RuntimeError) as error:
            row = dataclasses.replace(row, **{"why_not_bf16" if dtype == torch.bfloat16 else "why_not": str(error)})
        else:
            row = dataclasses.replace(row, numbers=numbers, why_not_merged=why_not_merged)
    return row


def _tried(arm: Peft, dtype: torch.dtype) -> tuple[int, str]:
    """Return (how many numbers it trains, why it cannot be merged or "")."""
    start, (setting,) = make_llama(dtype), arm.settings(MASK)
    before = {name: parameter.clone() for name, parameter in start.named_parameters()}
    ground = Ground(start, start, arm.targets(start, MASK, setting), MASK, setting, 1, lambda: make_rows(16))
    model = arm.untrained(ground)
    arm.train(model, ground, make_rows(16), TRAIN)
    weights = arm.trained_weights(model, ground)
    if changed := [name for name, parameter in start.named_parameters() if not torch.equal(parameter, before[name])]:
        raise MethodFailsError(f"it writes to the weights of its start, {changed[0]}")
    numbers, ids = sum(weight.numel() for weight in weights.values()), torch.arange(12)[None]
    try:
        merged = clone_with_weights(start, arm.merged(ground, weights))
    except MethodFailsError as error:
        return numbers, str(error)
    with torch.no_grad():
        own, other = (each(ids).logits for each in (model, merged))
    if dtype == torch.float32 and not torch.allclose(own, other, atol=1e-5):
        return numbers, f"merging moves the logits by {(own - other).abs().max():.2g}"
    return numbers, ""


def line(row: Row) -> str:
    """Return the page's table row for a method that was tried."""
    told = ", ".join(f"{name} {value}" for name, value in OPTIONS.get(row.method, {}).items())
    cells = [row.method, str(row.numbers), row.why_not_bf16 or "yes", row.why_not_merged or "yes", told]
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def page() -> str:
    """Return the page with all methods; those that run come first."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = [Row(method, why) if why else attempt(method) for method, why in methods().items()]
    runs, others = [row for row in rows if not row.why_not], [row for row in rows if row.why_not]
    lines = [HEAD.format(version=peft.__version__), f"## The {len(runs)} that run\n"]
    lines += ["| method | numbers | bf16 | merges | options |", "|---|---:|---|---|---|", *map(line, runs)]
    lines += [f"\n## The {len(others)} that do not\n", "| method | why |", "|---|---|"]
    lines += [f"| {row.method} | {row.why_not} |" for row in others]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
