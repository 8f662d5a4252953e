"""Figures of the pages that judge masks against the stored tables: intervals, steps, seconds, bytes."""

import re
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
        ("| [J](#j-smollm2-135m-from-the-published-model) |", "compare-from-base-smollm2", "code"),
        ("| [K](#k-smollm2-135m-over-codes) |", "compare-quantised", "code"),
        ("| [I](#i-by-rewards) |", "compare-rewards", "problems"),
        ("| [L](#l-smollm2-135m-by-rewards) |", "compare-rewards-smollm2", "problems"),
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


def test_the_losses_by_bytes_are_the_stored_ones():
    section = EVIDENCE.split("## G: bytes")[1].split("\n## ")[0]
    rows = stored("compare-bytes", "headers")
    arms = {
        **{"temperature alone": "temperature", "mask, free threshold": "MFT", "BitDelta of the control": "bitdelta"},
        **{f"mask, keep {ratio}": f"MFT (keep {ratio})" for ratio in ("0.99", "0.95")},
        **{f"LoRA, rank {rank}": f"LoRA (rank {rank})" for rank in (1, 8)},
        **{"ternary, 1 % of the control's deltas": "ternary 0.01", "ternary, 3 %": "ternary 0.03"},
        **{"ternary, 10 %": "ternary 0.1", "mask, deletion at a price of 0.03": "deletion 0.03"},
        **{"mean of 3 masks": "mean of 3 MFT", "control": "control", "mean of 3 controls": "mean of 3 controls"},
    }
    said = [cells(line) for line in section.splitlines() if line.startswith("| ") and "[" in line]
    assert sorted(name for name, *_ in said) == sorted(arms)
    for name, size, *losses in said:
        row = rows[arms[name]]
        less_control = "" if name == "control" or name.startswith("mean of") else row["loss - control"]
        assert size == row["bytes"], name
        assert [loss.replace("*", "") for loss in losses] == [row["loss - full fine-tune"], less_control], name


def test_the_losses_from_the_published_model_are_the_stored_ones():
    section = EVIDENCE.split("## J: SmolLM2-135M from the published model")[1].split("\n## ")[0]
    rows = stored("compare-from-base-smollm2", "code")
    arms = {
        **{"mask, free threshold": "MFT", "control": "control", "full fine-tune": "full fine-tune"},
        **{f"LoRA, rank {rank}": f"LoRA (rank {rank})" for rank in (4, 6, 16)},
        **{"BitDelta of the control": "bitdelta", "sparse, 1 % of its deltas": "sparse delta 0.01"},
        **{"ternary, 3 %": "ternary 0.03", "ternary, 10 %": "ternary 0.1"},
    }
    said = [cells(line) for line in section.splitlines() if line.startswith("| ") and "[" in line]
    assert sorted(name for name, *_ in said) == sorted(arms)
    for name, size, loss, less_control, forgotten in said:
        row = rows[arms[name]]
        assert size == row["bytes"], name
        assert loss == row["loss"], name
        assert less_control == ("" if name == "control" else row["loss - control"]), name
        assert forgotten == row["headers - start"], name


def test_the_losses_over_codes_of_smollm2_are_the_stored_ones():
    section = EVIDENCE.split("## K: SmolLM2-135M over codes")[1].split("\n## ")[0]
    rows = stored("compare-quantised", "code")
    arms = {
        **{"the published model": "base", "rounded to NF4": "NF4", "control, exact": "control"},
        **{"control, rounded afterwards": "NF4 of control", "mask, free threshold": "MFT on NF4"},
        **{f"QLoRA, rank {rank}": f"QLoRA {rank} on NF4" for rank in (4, 6, 347)},
        **{f"QLoRA, rank {rank}, taught": f"QLoRA {rank} taught by base" for rank in (6, 347)},
        "mask, taught by the exact model": "MFT taught by base",
    }
    said = [cells(line) for line in section.splitlines() if re.match(r"\| \D.*\d\.\d{4} \|", line)]
    assert sorted(name for name, *_ in said) == sorted(arms)
    for name, size, memory, loss, less_control, back, forgotten in said:
        row = rows[arms[name]]
        over_codes = arms[name].split()[-1] in ("NF4", "base") and name.startswith(("mask", "QLoRA"))
        assert size in ("", row["bytes"]), name
        assert memory == row["MB in training"].strip("-"), name
        assert loss == row["loss"], name
        assert less_control == (row["loss - control"] if over_codes else ""), name
        assert back == (f"{row['recovered %']} %" if over_codes else ""), name
        assert forgotten == row["headers - start"].removesuffix("-"), name


def test_exact_answers_by_rewards_are_the_stored_ones():
    section = EVIDENCE.split("## I: by rewards")[1].split("\n## ")[0]
    rows = stored("compare-rewards", "problems")
    arms = {
        **{"the fine-tune, without rewards": "full fine-tune", "all weights trained on": "continued"},
        **{"LoRA, rank 1": "LoRA", "mask, free threshold": "MFT", "deletion tuning": "deletion"},
        "the paper's setting, keep 0.9": "MFT (paper)",
    }
    said = [cells(line) for line in section.splitlines() if line.startswith("| ") and "[" in line]
    assert len(said) == len(arms)
    for name, exact, size in said:
        row = rows[arms[name]]
        assert exact.replace("*", "") == row["exact % - control"], name
        assert size in ("", row["bytes"]), name
    assert f"({rows['full fine-tune']['exact %']} % of 1,000 on test" in section


def test_exact_answers_of_smollm2_by_rewards_are_the_stored_ones():
    section = EVIDENCE.split("## L: SmolLM2-135M by rewards")[1].split("\n## ")[0]
    rows = stored("compare-rewards-smollm2", "problems")
    arms = {
        **{"the fine-tune, without rewards": "full fine-tune", "control": "control"},
        **{"LoRA, rank 1": "LoRA", "mask, free threshold": "MFT"},
    }
    said = [cells(line) for line in section.splitlines() if line.startswith(tuple(f"| {name}" for name in arms))]
    assert [name for name, *_ in said] == list(arms)
    for name, exact, less, size in said:
        row = rows[arms[name]]
        assert (exact, less or "-") == (row["exact %"], row["exact % - control"]), name
        assert size in ("", row["bytes"]), name


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
