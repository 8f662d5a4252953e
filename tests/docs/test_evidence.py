"""Figures of the pages that judge masks against the stored tables: intervals, steps, seconds, bytes."""

import re
from dataclasses import dataclass
from math import log2
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
EVIDENCE = (ROOT / "docs" / "evidence.md").read_text()
INTERVAL = re.compile(r"[+-]\d\.\d{4} \[[+-]\d\.\d{4}, [+-]\d\.\d{4}\]")
REBUILD = "+0.0026 [-0.0040, +0.0094]"  # of a study that is not stored, as the pages say


def cells(line):
    return [cell.strip(" *") for cell in line.strip().strip("|").split("|")]


def stored(study, domain):
    """{arm: {column: text}} of a domain's table in benchmarks/results."""
    section = (RESULTS / f"{study}.md").read_text().split(f"# {domain}: test split")[1].split("\n# ")[0]
    head, _, *rows = [cells(line) for line in section.splitlines() if line.startswith("|")]
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


@pytest.mark.parametrize("page", ["README.md", "docs/recipe.md", "docs/evidence.md", "docs/experts.md"])
def test_each_interval_that_judges_masks_stands_in_a_stored_table(page):
    tables = "".join(path.read_text() for path in RESULTS.glob("*.md"))
    said = " ".join((ROOT / page).read_text().split())  # an interval may go on in the next line
    assert [found for found in INTERVAL.findall(said) if found not in tables + REBUILD] == []


@pytest.mark.parametrize(
    ("begins", "study", "domain"),
    [
        ("| [B](#b-mft-compare), headers |", "compare-small", "headers"),
        ("| B, problems |", "compare-small", "problems"),
        ("| [C](#c-mft-compare-on-smollm2-135m) |", "compare-smollm2", "code"),
        ("| [D](#d-the-keep-ratio) |", "ablation-ratio-small", "headers"),
        ("| [F](#f-how-much-data) |", "ablation-data-small", "headers 0.0625"),
        ("| | | 65,536 |", "ablation-data-small", "headers 0.25"),
        ("| | | 262,144 |", "ablation-data-small", "headers 1"),
        ("| [G](#g-bytes) |", "compare-bytes", "headers"),
        ("| [H](#h-over-codes) |", "compare-quantised-small", "headers"),
        ("| [J](#j-smollm2-135m-instruct-without-a-fine-tune) |", "compare-from-base-smollm2", "code"),
        ("| [K](#k-smollm2-135m-instruct-over-codes) |", "compare-quantised", "code"),
        ("| [I](#i-by-rewards) |", "compare-rewards", "problems"),
        ("| [N](#n-lora-on-all-layers) |", "compare-all-layers-smollm2", "code"),
        ("| [O](#o-lora-on-all-layers-over-nf4) |", "compare-all-layers-quantised", "code"),
        ("| [L](#l-smollm2-135m-by-rewards) |", "compare-rewards-smollm2", "problems"),
        ("| [M](#m-on-policy-distillation-of-smollm2-135m) |", "compare-distillation-smollm2", "problems"),
        ("| [a mixture](experts.md#a-real-run) |", "compare-moe", "headers"),
    ],
)
def test_steps_and_seconds_of_control_and_mask_are_the_stored_ones(begins, study, domain):
    (line,) = [line for line in EVIDENCE.splitlines() if line.startswith(begins)]
    rows = stored(study, domain)
    *_, steps, seconds = cells(line)
    for said, column, rounding in ((steps, "steps", 0), (seconds, "s a run", 0.5)):
        of_both = [float(number.strip(" *")) for number in re.split("[;,]", said)[0].split("/")]
        arms = ("control", "MFT" if "MFT" in rows else "MFT on NF4")
        assert of_both == pytest.approx([float(rows[arm][column]) for arm in arms], rel=0, abs=rounding)


def test_the_losses_by_keep_ratio_are_the_stored_ones():
    section = EVIDENCE.split("## D: the keep ratio")[1].split("\n## ")[0]
    rows = stored("ablation-ratio-small", "headers")
    said = [cells(line) for line in section.splitlines() if re.match(r"\| (0|\*\*free|control)", line)]
    assert len(said) == 9
    for ratio, trained, *others in said:
        arm = {"free threshold": "MFT", "control (all weights, trained on)": "control"}.get(
            ratio, f"MFT (paper) {ratio}"
        )
        assert trained.replace("*", "") == rows[arm]["loss - full fine-tune"]
        for name, loss in zip(("magnitude", "random"), others):
            assert not loss or rows[f"{name} {ratio}"]["loss - full fine-tune"].startswith(loss)


def test_the_losses_by_layer_are_the_stored_ones():
    section = EVIDENCE.split("## E: which layers")[1].split("\n## ")[0]
    rows = stored("ablation-layers-small", "headers")
    said = [cells(line) for line in section.splitlines() if re.match(r"\| \d", line)]
    assert [layer for layer, *_ in said] == list("0123")
    for layer, *losses, behind in said:
        arms = (f"control {layer}", f"MFT (paper) {layer}", f"MFT {layer}")
        assert losses == [rows[arm]["loss - full fine-tune"] for arm in arms]
        assert behind == rows[f"MFT {layer}"]["loss - control"]
    (line,) = [line for line in EVIDENCE.splitlines() if line.startswith("| [E](#e-which-layers) |")]
    *_, steps, seconds = cells(line)
    both = [(rows[f"control {i}"], rows[f"MFT {i}"]) for i in range(4)]
    pairs = ", ".join(f"{control['steps']} / {mask['steps']}" for control, mask in both)
    assert f"by layer, {pairs};" in steps.replace("*", "")
    ends = [sorted(float(row["s a run"]) for row in rows_of_arm) for rows_of_arm in zip(*both)]
    assert seconds == " / ".join(f"{least} to {most}" for least, *_, most in ends)


def test_the_losses_by_how_much_data_are_the_stored_ones():
    section = EVIDENCE.split("## F: how much data")[1].split("\n## ")[0]
    said = [cells(line) for line in section.splitlines() if re.match(r"\| \d", line)]
    amounts = {"16,384": "0.0625", "65,536": "0.25", "262,144": "1"}
    assert [tokens for tokens, *_ in said] == list(amounts)
    for tokens, steps, *losses, behind in said:
        rows = stored("ablation-data-small", f"headers {amounts[tokens]}")
        arms = ("control", "MFT (paper)", "MFT")
        assert steps.replace("*", "") == " / ".join(rows[arm]["steps"] for arm in arms)
        assert losses == [rows[arm]["loss - full fine-tune"] for arm in arms]
        assert behind == rows["MFT"]["loss - control"]


@dataclass(frozen=True)
class Said:
    """A table of evidence.md: what is stored behind its columns, those of figures, and behind its rows."""

    heading: str
    study: str
    domain: str
    columns: tuple[str, ...]
    arms: tuple[tuple[str, str], ...]  # by the name that the row has; "": the row is of several

    def __str__(self) -> str:
        return self.heading.split(":")[0]


TABLES = (
    Said(
        "C: mft compare on SmolLM2-135M",
        "compare-smollm2",
        "code",
        ("steps", "bytes", "loss - full fine-tune", "loss - control", "headers - full fine-tune"),
        (
            ("control", "control"),
            ("the full model trained on", "continued"),
            ("LoRA, rank 8", "LoRA"),
            ("MFT in the paper's setting", "MFT (paper)"),
            ("MFT, keep 0.99, magnitude scores", "MFT (keep 0.99)"),
            ("MFT, free threshold", "MFT"),
            ("the fine-tune, 0.8 of its way", "interpolated full"),
        ),
    ),
    Said(
        "G: bytes",
        "compare-bytes",
        "headers",
        ("bytes", "loss - full fine-tune", "loss - control", "stdlib - full fine-tune"),
        (
            ("temperature alone", "temperature"),
            ("mask, keep 0.99", "MFT (keep 0.99)"),
            ("ternary, 1 % of the control's deltas", "ternary 0.01"),
            ("mask, deletion at a price of 0.03", "deletion 0.03"),
            ("LoRA, rank 1", "LoRA (rank 1)"),
            ("ternary, 3 %", "ternary 0.03"),
            ("mask, keep 0.95", "MFT (keep 0.95)"),
            ("ternary, 10 %", "ternary 0.1"),
            ("mask, free threshold", "MFT"),
            ("BitDelta of the control", "bitdelta"),
            ("LoRA, rank 8", "LoRA (rank 8)"),
            ("mean of 3 masks", "mean of 3 MFT"),
            ("control", "control"),
            ("mean of 3 controls", "mean of 3 controls"),
        ),
    ),
    Said(
        "H: over codes",
        "compare-quantised-small",
        "headers",
        ("loss - full fine-tune", "bytes", "MB in training", "pretraining - full fine-tune"),
        (
            ("the rounded fine-tune", "NF4"),
            ("mask, free threshold", "MFT on NF4"),
            ("QLoRA, rank 4", "QLoRA 4 on NF4"),
            ("QLoRA, rank 81", "QLoRA 81 on NF4"),
            ("the control, rounded afterwards", "NF4 of control"),
            ("masks found in one shot", ""),
            ("the rounded fine-tune", "int8"),
            ("mask, free threshold", "MFT on int8"),
            ("QLoRA, rank 4", "QLoRA 4 on int8"),
            ("QLoRA, rank 81", "QLoRA 81 on int8"),
            ("the control, rounded afterwards", "int8 of control"),
        ),
    ),
    Said(
        "I: by rewards",
        "compare-rewards",
        "problems",
        ("exact % - control", "bytes"),
        (
            ("the fine-tune, without rewards", "full fine-tune"),
            ("all weights trained on", "continued"),
            ("LoRA, rank 1", "LoRA"),
            ("mask, free threshold", "MFT"),
            ("deletion tuning", "deletion"),
            ("the paper's setting, keep 0.9", "MFT (paper)"),
        ),
    ),
    Said(
        "J: SmolLM2-135M-Instruct without a fine-tune",
        "compare-from-base-smollm2",
        "code",
        ("bytes", "loss", "loss - control", "headers - start"),
        (
            ("full fine-tune", "full fine-tune"),
            ("control", "control"),
            ("mask, free threshold", "MFT"),
            *((f"LoRA, rank {rank}", f"LoRA (rank {rank})") for rank in (4, 6, 16)),
            ("BitDelta of the control", "bitdelta"),
            ("ternary, 10 %", "ternary 0.1"),
            ("ternary, 3 %", "ternary 0.03"),
            ("sparse, 1 % of its deltas", "sparse delta 0.01"),
        ),
    ),
    Said(
        "K: SmolLM2-135M-Instruct over codes",
        "compare-quantised",
        "code",
        ("bytes", "MB in training", "loss", "loss - control", "recovered %", "headers - start"),
        (
            ("the model itself", "base"),
            ("rounded to NF4", "NF4"),
            ("control, exact", "control"),
            ("control, rounded afterwards", "NF4 of control"),
            ("mask, free threshold", "MFT on NF4"),
            *((f"QLoRA, rank {rank}", f"QLoRA {rank} on NF4") for rank in (4, 6, 347)),
            ("mask, taught by the exact model", "MFT taught by base"),
            *((f"QLoRA, rank {rank}, taught", f"QLoRA {rank} taught by base") for rank in (6, 347)),
        ),
    ),
    Said(
        "L: SmolLM2-135M by rewards",
        "compare-rewards-smollm2",
        "problems",
        ("exact %", "exact % - control", "bytes"),
        (
            ("the fine-tune, without rewards", "full fine-tune"),
            ("control", "control"),
            ("LoRA, rank 1", "LoRA"),
            ("mask, free threshold", "MFT"),
        ),
    ),
    Said(
        "M: on-policy distillation of SmolLM2-135M",
        "compare-distillation-smollm2",
        "problems",
        ("exact %", "exact % - control", "loss - full fine-tune", "stdlib - start", "KL to start", "bytes"),
        (
            ("the teacher", "full fine-tune"),
            ("all weights", "continued"),
            ("control", "control"),
            ("LoRA, rank 4", "LoRA"),
            ("mask, free threshold", "MFT"),
        ),
    ),
    Said(
        "N: LoRA on all layers",
        "compare-all-layers-smollm2",
        "code",
        ("bytes", "loss", "loss - control", "headers - start"),
        (
            ("full fine-tune", "full fine-tune"),
            ("LoRA, rank 1 on all layers", "LoRA (rank 1 on all layers)"),
            ("control", "control"),
            ("mask, free threshold", "MFT"),
            ("LoRA, rank 6", "LoRA (rank 6)"),
        ),
    ),
    Said(
        "O: LoRA on all layers over NF4",
        "compare-all-layers-quantised",
        "code",
        ("bytes", "MB in training", "loss", "recovered %", "headers - start"),
        (
            ("the model itself", "base"),
            ("rounded to NF4", "NF4"),
            ("control, rounded afterwards", "NF4 of control"),
            ("QLoRA, rank 1 on all layers", "QLoRA 1 on all layers of NF4"),
            ("mask, free threshold", "MFT on NF4"),
            ("QLoRA, rank 4", "QLoRA 4 on NF4"),
            ("QLoRA, rank 6", "QLoRA 6 on NF4"),
        ),
    ),
)


def said_rows(section):
    """The cells of a section's table, without its heads and the rows that are headings in it."""
    lines = section.splitlines()
    tables = [line for line, after in zip(lines, [*lines[1:], ""]) if line.startswith("| ") and "|---" not in after]
    return [row for row in map(cells, tables) if sum(map(bool, row)) > 1]


@pytest.mark.parametrize("table", TABLES, ids=str)
def test_each_figure_of_a_table_is_the_stored_one(table):
    """An empty cell says nothing. Cells before the figures are words of ours."""
    rows = stored(table.study, table.domain)
    section = EVIDENCE.split(f"\n## {table.heading}\n")[1].split("\n## ")[0]
    said = said_rows(section)
    assert [name for name, *_ in said] == [name for name, _ in table.arms]
    for (_, arm), (name, *figures) in zip(table.arms, said):
        for column, figure in zip(table.columns, figures[-len(table.columns) :], strict=True) if arm else ():
            assert figure.replace("*", "").removesuffix(" %") in ("", rows[arm][column]), (name, column)
    for column in range(1, len(table.columns) + 1):
        assert any(row[-column] for row in said)


def test_the_share_of_exact_answers_before_rewards_is_the_stored_one():
    section = EVIDENCE.split("## I: by rewards")[1].split("\n## ")[0]
    fine_tune = stored("compare-rewards", "problems")["full fine-tune"]
    assert f"({fine_tune['exact %']} % of 1,000 on test" in section


def test_the_bytes_of_a_task_follow_from_the_shapes():
    page = (ROOT / "docs" / "many-masks.md").read_text()
    shapes = [
        (576, 576),
        (192, 576),
        (192, 576),
        (576, 576),
        (1536, 576),
        (1536, 576),
        (576, 1536),
    ]  # q k v o gate up down
    weights, sides = (sum(n * k for n, k in shapes), sum(n + k for n, k in shapes))

    def coded(dropped):
        return -(dropped * log2(dropped) + (1 - dropped) * log2(1 - dropped)) / 8

    for layers in (6, 30):
        exact = [2 * weights * layers, weights * layers // 8, 16 * sides * layers, 4 * sides * layers]
        rounded = [f"{weights * layers * coded(dropped) / 1e6:.2f} MB" for dropped in (0.0332, 0.01)]
        for text in [*(f"{count:,}" for count in exact), *rounded]:
            assert f" {text} |" in page, text
