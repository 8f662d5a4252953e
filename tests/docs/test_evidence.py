"""Compare the pages that judge masks with the stored tables: intervals, steps, seconds, bytes."""

import re
from dataclasses import dataclass
from math import log2
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
OVERVIEW = ROOT / "docs" / "explanation" / "evidence.md"
STUDIES = sorted((ROOT / "docs" / "explanation" / "evidence").glob("*.md"))
JUDGING = ["README.md", "docs/how-to/recipe.md", "docs/explanation/evidence.md", "docs/how-to/experts.md"]
INTERVAL = re.compile(r"[+-]\d+\.\d+ \[[+-]\d+\.\d+, [+-]\d+\.\d+\]")
P_VALUE = re.compile(rf"({INTERVAL.pattern})[^.;:|\[]{{0,20}}\bp (<? ?0\.\d+)")
REBUILD = "+0.0026 [-0.0040, +0.0094]"  # of a study that is not stored, as the page says
STEPS = re.compile(r"control (\d+) in ([\d.]+) s; mask (\d+) in ([\d.]+) s")


def cells(line):
    return [cell.strip(" *") for cell in line.strip().strip("|").split("|")]


def plain(text):
    """Return the text in one line, because an interval may continue on the next line, and without bold type."""
    return " ".join(text.replace("*", "").split())


def stored(study, domain):
    """Return {arm: {column: text}} of a domain's table in benchmarks/results."""
    section = (RESULTS / f"{study}.md").read_text().split(f"# {domain}: test split")[1].split("\n# ")[0]
    head, _, *rows = [cells(line) for line in section.splitlines() if line.startswith("|")]
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def tables(page, heading):
    """Return the tables in a section of a page of docs/evidence, each as the cells of its rows without the head."""
    text = (OVERVIEW.with_suffix("") / f"{page}.md").read_text()
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = re.findall(r"^\|.*\n\|[-:|]+\|\n((?:\|.*\n)+)", section, re.MULTILINE)
    return [[cells(line) for line in rows.splitlines()] for rows in found]


def setting(page):
    """Return {row: the cells after its name} of a page's setting."""
    (rows,) = tables(page, "Setting")
    return {name: values for name, *values in rows}


def rounded(figure, said):
    """Return a stored figure with as many decimals as the page gives."""
    return f"{float(figure):.{len(said.partition('.')[2])}f}"


@pytest.mark.parametrize("page", [*JUDGING, *(path.relative_to(ROOT).as_posix() for path in STUDIES)])
def test_each_interval_that_judges_masks_stands_in_a_stored_table(page):
    reports = "".join(path.read_text() for path in RESULTS.glob("*.md"))
    said = plain((ROOT / page).read_text())
    assert [found for found in INTERVAL.findall(said) if found not in reports + REBUILD] == []


@pytest.mark.parametrize("page", STUDIES, ids=lambda page: page.stem)
def test_the_p_of_an_interval_is_the_stored_one(page):
    reports = plain("".join(path.read_text() for path in RESULTS.glob("*.md")))
    for interval, p in P_VALUE.findall(plain(page.read_text())):
        unit = r"(?: nats per token,| % of questions answered exactly,)?"
        behind = re.escape(interval) + unit + r" (?:Holm-adjusted p|\|) "
        assert re.search(rf"{behind}{p.replace(' ', '')}(?![\d.])", reports), (interval, p)


def test_each_effect_of_the_overview_is_that_of_the_study_it_links_to():
    rows = [line for line in OVERVIEW.read_text().splitlines() if "](evidence/" in line and INTERVAL.search(line)]
    assert len(rows) >= 15
    for row in rows:
        linked = re.findall(r"\]\((evidence/[^)]+)\)", row)
        studies = "".join(plain((OVERVIEW.parent / link).read_text()) for link in linked)
        assert INTERVAL.search(row)[0] in studies, row


@pytest.mark.parametrize(
    ("page", "row", "column", "study", "domain"),
    [
        ("same-weights", "steps per run, headers", 0, "compare-small", "headers"),
        ("same-weights", "steps per run, problems", 0, "compare-small", "problems"),
        ("after-a-fine-tune", "steps per run", 0, "compare-smollm2", "code"),
        ("keep-ratio", "steps per run", 0, "ablation-ratio-small", "headers"),
        ("equal-bytes", "steps per run", 0, "compare-bytes", "headers"),
        ("quantised-small", "steps per run", 0, "compare-quantised-small", "headers"),
        ("equal-bytes-smollm2", "steps per run", 0, "compare-from-base-smollm2", "code"),
        ("quantised-smollm2", "steps per run", 0, "compare-quantised", "code"),
        ("rewards", "steps per run", 0, "compare-rewards", "problems"),
        ("rewards", "steps per run", 1, "compare-rewards-smollm2", "problems"),
        ("lora-all-layers", "steps per run", 0, "compare-all-layers-smollm2", "code"),
        ("lora-all-layers-nf4", "steps per run", 0, "compare-all-layers-quantised", "code"),
        ("distillation", "steps per run", 0, "compare-distillation-smollm2", "problems"),
    ],
)
def test_steps_and_seconds_of_control_and_mask_are_the_stored_ones(page, row, column, study, domain):
    said = STEPS.match(setting(page)[row][column]).groups()
    rows = stored(study, domain)
    arms = ("control", "MFT" if "MFT" in rows else "MFT on NF4")
    behind = [rows[arm][of] for arm in arms for of in ("steps", "s per run")]
    assert list(said) == [rounded(figure, text) for figure, text in zip(behind, said)]


def test_steps_and_seconds_on_experts_are_the_stored_ones():
    rows = stored("compare-moe", "headers")
    control, mask = rows["control"], rows["MFT"]
    assert control["steps"] == mask["steps"]
    said = f"({mask['steps']}; {mask['s per run']} and {control['s per run']} s per run)"
    assert said in (ROOT / "docs" / "how-to" / "experts.md").read_text()


def test_the_losses_by_keep_ratio_are_the_stored_ones():
    rows = stored("ablation-ratio-small", "headers")
    (said,) = tables("keep-ratio", "Result")
    assert len(said) == 7
    for ratio, trained, *others in said:
        arm = {"free threshold": "MFT", "control": "control"}.get(ratio, f"MFT (paper) {ratio}")
        assert trained.replace("*", "") == rows[arm]["loss - full fine-tune"]
        for name, loss in zip(("magnitude", "random"), others):
            assert not loss or rows[f"{name} {ratio}"]["loss - full fine-tune"].startswith(loss)
    seconds = sorted(float(row["s per run"]) for arm, row in rows.items() if arm.startswith("MFT (paper)"))
    of_the_paper = setting("keep-ratio")["steps per run"][0].split("; ")[-1]
    assert of_the_paper == f"the paper's scores {rows['MFT (paper) 0.9']['steps']}, {seconds[0]} to {seconds[-1]}"


def test_the_losses_by_layer_are_the_stored_ones():
    rows = stored("ablation-layers-small", "headers")
    (said,) = tables("layers", "Result")
    assert [layer for layer, *_ in said] == list("0123")
    for layer, steps, *losses, behind in said:
        arms = (f"control {layer}", f"MFT (paper) {layer}", f"MFT {layer}")
        assert steps == f"{rows[arms[0]]['steps']} / {rows[arms[-1]]['steps']}"
        assert losses == [rows[arm]["loss - full fine-tune"] for arm in arms]
        assert behind == rows[f"MFT {layer}"]["loss - control"]
    for name, arm in (("control", "control"), ("mask", "MFT")):
        least, *_, most = sorted(float(rows[f"{arm} {i}"]["s per run"]) for i in range(4))
        assert setting("layers")[name][0].startswith(f"{least} to {most} s per run")


def test_the_losses_by_how_much_data_are_the_stored_ones():
    (said,) = tables("amount-of-data", "Result")
    amounts = {"16,384": "0.0625", "65,536": "0.25", "262,144": "1"}
    assert [tokens for tokens, *_ in said] == list(amounts)
    for tokens, steps, seconds, *losses, behind in said:
        rows = stored("ablation-data-small", f"headers {amounts[tokens]}")
        arms = ("control", "MFT (paper)", "MFT")
        assert steps == " / ".join(rows[arm]["steps"] for arm in arms)
        assert seconds == " / ".join(rows[arm]["s per run"] for arm in ("control", "MFT"))
        assert losses == [rows[arm]["loss - full fine-tune"] for arm in arms]
        assert behind == rows["MFT"]["loss - control"]


def test_the_variants_under_a_budget_are_the_stored_ones():
    report = (RESULTS / "budget-search.md").read_text()
    rows = {row[0]: row[1:4] for row in map(cells, report.splitlines()) if len(row) == 6}
    names = {
        "`init: constant`, all scores equal": "constant start",
        "the same share of each matrix": "share of each matrix",
        "mode magnitude": "magnitude mode",
    }
    said = tables("budget", "Result")[0]
    assert len(said) == 4
    for name, *figures in said:
        assert figures == rows[names.get(name, name)], name


@dataclass(frozen=True)
class Said:
    """A table of a study's page: the stored columns and rows that it shows."""

    page: str
    number: int  # among the tables of the page's result
    study: str
    domain: str
    columns: list[str]
    arms: list[tuple[str, str]]  # by the name in the row

    def __str__(self) -> str:
        return f"{self.page}-{self.number}"


# Each table: page, number: study, domain; its columns; its rows, with the stored name where that is another one.
SHOWN = """
same-weights 0: compare-small, headers
    loss - full fine-tune | stdlib - full fine-tune
    control | mean of 3 controls | all weights trained on = continued | LoRA, rank 8 = LoRA |
    mask, the paper's setting = MFT (paper) | mask = MFT | mask, 0.8 = interpolated MFT |
    mean of 3 masks = mean of 3 MFT
same-weights 1: compare-small, problems
    loss - full fine-tune | stdlib - full fine-tune | exact %
    control | LoRA, rank 8 = LoRA | mask = MFT
after-a-fine-tune 0: compare-smollm2, code
    bytes | loss - full fine-tune | headers - full fine-tune
    mask, the paper's setting = MFT (paper) | mask = MFT | control | all weights trained on = continued |
    LoRA, rank 8 = LoRA | mask, keep 0.99 = MFT (keep 0.99) | the fine-tune, 0.8 of its way = interpolated full
equal-bytes 0: compare-bytes, headers
    bytes | loss - full fine-tune | stdlib - full fine-tune
    temperature alone = temperature | LoRA, rank 1 = LoRA (rank 1) | mask, keep 0.95 = MFT (keep 0.95) |
    ternary, 10 % of the control's deltas = ternary 0.1 | mask = MFT | LoRA, rank 8 = LoRA (rank 8) |
    mean of 3 masks = mean of 3 MFT | control
quantised-small 0: compare-quantised-small, headers
    loss - full fine-tune | bytes | MB in training | pretraining - full fine-tune
    mask = MFT on NF4 | QLoRA, rank 4 = QLoRA 4 on NF4 | QLoRA, rank 81 = QLoRA 81 on NF4 |
    the control, rounded afterwards = NF4 of control
quantised-small 1: compare-quantised-small, headers
    loss - full fine-tune | bytes | MB in training | pretraining - full fine-tune
    mask = MFT on int8 | QLoRA, rank 4 = QLoRA 4 on int8
into-codes 0: compare-quantised-patched, headers
    bytes | resident bytes | loss
    mask = MFT on NF4 | mask, in the codes = MFT in NF4 | QLoRA, rank 4 = QLoRA 4 on NF4 |
    QLoRA, rank 4, in the codes = QLoRA 4 in NF4 | QLoRA, rank 81 = QLoRA 81 on NF4 |
    QLoRA, rank 81, in the codes = QLoRA 81 in NF4
into-codes 1: compare-quantised-patched, headers
    bytes | resident bytes | loss
    mask = MFT on NF4 of base | mask, in the codes = MFT in NF4 of base | QLoRA, rank 4 = QLoRA 4 on NF4 of base |
    QLoRA, rank 4, in the codes = QLoRA 4 in NF4 of base | QLoRA, rank 81 = QLoRA 81 on NF4 of base |
    QLoRA, rank 81, in the codes = QLoRA 81 in NF4 of base
rewards 0: compare-rewards, problems
    exact % - control | bytes
    mask, the paper's setting = MFT (paper) | deletion tuning = deletion | mask = MFT | LoRA, rank 1 = LoRA |
    the fine-tune, without rewards = full fine-tune
rewards 1: compare-rewards-smollm2, problems
    exact % | exact % - control | bytes
    the fine-tune, without rewards = full fine-tune | control | LoRA, rank 1 = LoRA | mask = MFT
equal-bytes-smollm2 0: compare-from-base-smollm2, code
    bytes | loss | loss - control | headers - start
    full fine-tune | control | mask = MFT | LoRA, rank 6 = LoRA (rank 6) | LoRA, rank 16 = LoRA (rank 16) |
    BitDelta of the control = bitdelta | ternary, 3 % of its deltas = ternary 0.03
quantised-smollm2 0: compare-quantised, code
    bytes | MB in training | loss | recovered % | headers - start
    the model itself = base | rounded to NF4 = NF4 | control, rounded afterwards = NF4 of control |
    mask = MFT on NF4 | QLoRA, rank 4 = QLoRA 4 on NF4 | QLoRA, rank 6 = QLoRA 6 on NF4 |
    QLoRA, rank 347 = QLoRA 347 on NF4
distillation 0: compare-distillation-smollm2, problems
    exact % | exact % - control | stdlib - start | bytes
    the teacher = full fine-tune | all weights = continued | control | LoRA, rank 4 = LoRA | mask = MFT
lora-all-layers 0: compare-all-layers-smollm2, code
    bytes | loss | headers - start
    full fine-tune | LoRA, rank 1 on all layers = LoRA (rank 1 on all layers) | control | mask = MFT
lora-all-layers-nf4 0: compare-all-layers-quantised, code
    bytes | MB in training | loss | recovered % | headers - start
    QLoRA, rank 1 on all layers = QLoRA 1 on all layers of NF4 | mask = MFT on NF4
"""


def read_shown():
    for page, study, columns, rows in re.findall(r"^(\S+ \d): (.*)\n +(.*)\n((?: +.*\n)+)", SHOWN, re.MULTILINE):
        arms = [row.partition(" = ") for row in " ".join(rows.split()).split(" | ")]
        named = [(name, arm or name) for name, _, arm in arms]
        name, number = page.split()
        yield Said(name, int(number), *study.split(", "), columns.split(" | "), named)


TABLES = tuple(read_shown())


@pytest.mark.parametrize("table", TABLES, ids=str)
def test_each_figure_of_a_table_is_the_stored_one(table):
    """Empty cells are not compared."""
    rows = stored(table.study, table.domain)
    said = tables(table.page, "Result")[table.number]
    assert [name for name, *_ in said] == [name for name, _ in table.arms]
    for (_, arm), (name, *figures) in zip(table.arms, said):
        for column, figure in zip(table.columns, figures, strict=True):
            assert figure.replace("*", "").removesuffix(" %") in ("", rows[arm][column]), (name, column)
    for column in range(1, len(table.columns) + 1):
        assert any(row[column] for row in said)


def test_every_table_of_figures_is_held_against_the_stored_ones():
    """Except tables of studies that are not stored, and tables that tests of their own check."""
    others = {("keep-ratio", 0), ("layers", 0), ("amount-of-data", 0), ("budget", 0)}
    not_stored = {("mask-settings", 0), ("budget", 1)}
    held = {(table.page, table.number) for table in TABLES} | others | not_stored
    assert held == {(page.stem, number) for page in STUDIES for number in range(len(tables(page.stem, "Result")))}


def test_the_share_of_exact_answers_before_rewards_is_the_stored_one():
    fine_tune = stored("compare-rewards", "problems")["full fine-tune"]
    page = plain((ROOT / "docs" / "explanation" / "evidence" / "rewards.md").read_text())
    assert f"no arm leaves its start, {fine_tune['exact %']} % right" in page


def test_the_bytes_of_a_task_follow_from_the_shapes():
    page = (ROOT / "docs" / "how-to" / "many-masks.md").read_text()
    # q k v o gate up down
    shapes = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
    weights, sides = (sum(n * k for n, k in shapes), sum(n + k for n, k in shapes))

    def coded(dropped):
        return -(dropped * log2(dropped) + (1 - dropped) * log2(1 - dropped)) / 8

    for layers in (6, 30):
        exact = [2 * weights * layers, weights * layers // 8, 16 * sides * layers, 4 * sides * layers]
        rounded = [f"{weights * layers * coded(dropped) / 1e6:.2f} MB" for dropped in (0.0332, 0.01)]
        for text in [*(f"{count:,}" for count in exact), *rounded]:
            assert f" {text} |" in page, text
    llama2 = [(4096, 4096)] * 4 + [(11008, 4096)] * 3
    weights, sides = (32 * sum(n * k for n, k in llama2), 32 * sum(n + k for n, k in llama2))
    tasks = [2 * weights, weights / 8, 16 * sides, weights * coded(0.0332), 4 * sides, weights * coded(0.01)]
    column = [f"{30 * count / 1e9:.1f} GB" for count in tasks]
    assert re.findall(r"\| ([\d.]+ GB) \|$", page, re.MULTILINE) == column
    assert f"{column[2]} as LoRA of rank 8, and {column[1]} as masks" in page
