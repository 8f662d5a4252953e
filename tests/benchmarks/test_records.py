"""Stored results by machine: names, what is read again, and the page that shows them next to each other."""

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import (
    bench_cpu,
    bench_experts,
    bench_generate,
    bench_launch,
    bench_serve,
    harness,
    measured,
)
from benchmarks.compare import ratios
from benchmarks.cpu_targets import TARGETS
from benchmarks.layer_competitors import FROM_SCORES, HELD
from benchmarks.pooled import pooled
from benchmarks.records import ON_ANY, RESULTS, file_name, read_all, read_machines, select_records
from benchmarks.serve_load import write_tiny_base
from benchmarks.tables import cpu_table, experts_table, generate_table, launch_table, serve_table, show
from mft.memory.shapes import known_config

SMALL = bench_cpu.Budget(
    many=(((4, 64), (("forward", 1), ("step", 3))), ((4, 32), (("d_x", 2),))),
    one=(((4, 64), (("step", 3),)),),
    seconds=0.0,
    ceilings=16,
)
TINY = bench_generate.Budget(
    prompt=3,
    new=2,
    seconds=0.0,
    config=known_config("smollm2-135m")
    | {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 256}
    | {"num_attention_heads": 2, "num_key_value_heads": 1},
)

FEW_AND_MANY = bench_experts.Size(4, 32, 24, 2), bench_experts.Size(16, 32, 24, 3)


def test_the_instruction_set_is_in_the_name_of_what_it_decides():
    assert file_name("ops", "amx") == "ops-cpu-amx.json"
    assert file_name("cpu", "amx") == "cpu-amx.json"
    assert file_name("memory_cards", "amx") == "memory_cards-cpu.json"


def stored(folder, name, **environment):
    (folder / name).write_text(json.dumps({"environment": {"device": "AMD EPYC family 25 model 17", **environment}}))


def test_answers_are_found_by_question_and_by_machine(tmp_path):
    stored(tmp_path, "ops-cpu-avx2.json", instruction_set="avx2")
    stored(tmp_path, "ops-cpu-amx.json", instruction_set="amx")
    stored(tmp_path, "cpu-avx512.json", instruction_set="avx512")
    stored(tmp_path, "memory_cards-cpu.json", instruction_set="amx")
    stored(tmp_path, "scaling-cpu.json", backend="C++, avx512_bf16")  # from before names contained the instruction set
    stored(tmp_path, "compare-small.json")
    stored(tmp_path, "memory_blocks-cuda.json")
    records = read_all(tmp_path)
    assert set(select_records(records, "amx")) == {"ops", "memory_cards"}
    assert set(select_records(records, "avx512")) == {"cpu", "memory_cards"}
    assert set(select_records(records, "avx512_bf16")) == {"scaling", "memory_cards"}
    assert list(read_machines(tmp_path, "ops")) == ["amx", "avx2"]
    assert list(read_machines(tmp_path, "cpu")) == ["avx512"]
    assert read_machines(tmp_path, "train_step") == {}


def test_every_stored_answer_of_a_processor_has_its_instruction_set_in_its_name():
    for name, record in read_all(RESULTS):
        question = record.get("question", name.removesuffix("-cpu.json"))
        own = record["environment"].get("instruction_set") or record["environment"]["backend"].removeprefix("C++, ")
        assert name == file_name(question, own)
    assert all((RESULTS / file_name(question, "")).exists() for question in ON_ANY)


@pytest.mark.parametrize("path", measured.DOCUMENTS, ids=lambda path: path.stem)
def test_the_page_shows_what_is_stored(path):
    assert measured.rewrite_tables(path) == path.read_text(), "python -m benchmarks.measured"


# ---------------------------------------------------------------------------------------------- the question cpu


def test_every_target_is_measured():
    asked = {(op, shape, m) for shape, cases in bench_cpu.MANY_THREADS for op, m in cases}
    assert {(target.op, target.shape, target.m) for target in TARGETS} <= asked


@pytest.fixture(scope="module")
def two_machines(tmp_path_factory):
    """Return a folder with small answers to cpu and generate; the second machine has renamed copies."""
    folder = tmp_path_factory.mktemp("two_machines")
    targets = {("step", "amx", HELD): 1000.0, ("step", "amx", FROM_SCORES): 0.001}
    torch.set_num_threads(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "_folder", folder)
        patch.setattr(bench_cpu, "bound", lambda name, dtype, op, *rest: targets.get((op, name, rest[-1])))
        for module in (harness, bench_cpu):
            patch.setattr(module, "instruction_set", lambda: "amx")
        bench_cpu.main(budget=SMALL)
        bench_generate.main(budget=TINY)
    torch.set_num_threads(1)
    for question in ("cpu", "generate"):
        record = json.loads((folder / file_name(question, "amx")).read_text())
        record["environment"]["instruction_set"] = "avx2"
        for case in record.get("cases", []):
            case["target"] = None
        (folder / file_name(question, "avx2")).write_text(json.dumps(record))
    return folder


def test_the_targets_and_the_machines_stand_side_by_side(two_machines, capsys):
    records = read_machines(two_machines, "cpu")
    assert list(records) == ["amx", "avx2"]
    table = cpu_table(records)
    (line,) = [line for line in table.splitlines() if "| step, bf16, 4 x 64, M = 3 |" in line]
    _, scores, held, _, _, scores_elsewhere, *_ = [cell.strip() for cell in line.split("|")[2:]]
    assert re.fullmatch(r"\*\*[\d.]+\*\* \(0\.00\)", scores)  # missed
    assert re.fullmatch(r"[\d.]+ \(1000\.00\)", held)
    assert scores_elsewhere == scores.split()[0].strip("*")  # there is no target for this machine
    assert generate_table(read_machines(two_machines, "generate")).splitlines()[0].count("bf16") == 2
    show("cpu", records)
    assert "% of the ceiling" in capsys.readouterr().out


@pytest.mark.slow
def test_the_question_of_the_server_is_answered(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "_folder", tmp_path)
    base = Path(write_tiny_base(tmp_path))
    sizes = {"rows": (1, 8), "prompt": 3, "new": 4, "long": 2000, "lasting": 600, "cache": 64}
    bench_serve.main(budget=bench_serve.Budget(base=lambda: base, rounds=2, **sizes))
    records = read_machines(tmp_path, "serve")
    (record,) = records.values()
    assert [(case["rows"], case["tasks"]) for case in record["cases"]] == [(1, 1), (8, 1), (8, 4)]
    assert [case["answer"]["requests"] for case in record["cases"]] == [2, 16, 16]
    asked = {finding["quantity"]: finding["bound"] for finding in record["findings"] if finding["rule"] is not None}
    assert asked == {
        **{f"ours, {way}, 1 task / generate of the base: 8 requests": 1.053 for way in ("engine", "over HTTP")},
        **{f"ours, {way}, 4 tasks / generate of the base: 8 requests": 1.176 for way in ("engine", "over HTTP")},
        "first token while a long prompt is read": 3,
        "peak memory beyond base and masks": 64,
    }
    for case in record["cases"]:
        case["ours, engine"]["ratio"]["median"] = 1.2
    bold = [line for line in serve_table(records).splitlines() if "(0.83)**" in line]
    assert [line.split("|")[1:3] for line in bold] == [[" 8 ", " 1 "], [" 8 ", " 4 "]]


# ---------------------------------------------------------------------------------------------- the question experts


def test_the_question_of_experts_is_answered(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "_folder", tmp_path)
    bench_experts.main(budget=bench_experts.Budget(sizes=FEW_AND_MANY, tokens=(1, 5), seconds=0.0, least=1))
    records = read_machines(tmp_path, "experts")
    (record,) = records.values()
    assert experts_table(records).count("\n") == 2 + 1 + 2 * 2 * 3
    for case in record["cases"]:
        case["ratio"]["median"] = 1.16
    assert experts_table(records).count("**1.16**") == 2 * 2 * 3 * 2
    asked = [finding for finding in record["findings"] if finding["bound"] == bench_experts.BOUND]
    assert len(asked) == len(record["findings"])


# ---------------------------------------------------------------------------------------------- the question launch


def test_launch_tells_ours_above_nn_linear_in_every_situation(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "_folder", tmp_path)
    goals = {"without grad": 1e6, "under inference_mode": 1e6, "with grad": -1e6, "forward + backward": None}
    assert goals.keys() == bench_launch.GOALS.keys() == bench_launch.MODES.keys()
    monkeypatch.setattr(bench_launch, "GOALS", goals)
    bench_launch.main(budget=bench_launch.Budget(rounds=2, calls=1))
    records = read_machines(tmp_path, "launch")
    (record,) = records.values()
    assert record["environment"]["threads"] == 1
    assert len(record["calls"]) == 2 * 4 * 4
    assert len(ratios(record)) == 2 * 4 * 3
    assert pooled([record, record])["calls"][1] == record["calls"][1] | {"rounds": 4}
    assert launch_table(records).count("**") == 2 * 2 * 3  # a goal that is missed, in both dtypes
    assert launch_table(records).count("\n") == 1 + 4 * 4
