"""Stored results by machine: names, what is read again, and the page that shows them side by side."""

import json
import re

import pytest
import torch

from benchmarks import bench_cpu, bench_generate, harness, measured, plots
from benchmarks.cpu_targets import AMX, AVX512_BF16, COLUMNS, FP32, TARGETS, bound, column
from benchmarks.layer_competitors import FROM_SCORES, HELD
from benchmarks.pooled import pooled
from benchmarks.records import ON_ANY, RESULTS, by_machine, by_question, file_name, instruction_sets, machine, read_all
from benchmarks.tables import cpu_tables, generate_tables
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
    stored(tmp_path, "scaling-cpu.json", backend="C++, avx512_bf16")  # from before names told it
    stored(tmp_path, "compare-small.json")
    stored(tmp_path, "memory_blocks-cuda.json")
    records = read_all(tmp_path)
    assert set(by_question(records, "amx")) == {"ops", "memory_cards"}
    assert set(by_question(records, "avx512")) == {"cpu", "memory_cards"}
    assert set(by_question(records, "avx512_bf16")) == {"scaling", "memory_cards"}
    assert instruction_sets(records) == ["amx", "avx512_bf16", "avx512", "avx2"]
    assert list(by_machine(tmp_path, "ops")) == ["amx", "avx2"]
    assert list(by_machine(tmp_path, "cpu")) == ["avx512"]
    assert by_machine(tmp_path, "train_step") == {}


def test_a_machine_is_named_in_few_words():
    def named(device):
        return machine({"environment": {"device": device, "instruction_set": "amx"}})

    assert named("Intel(R) Xeon(R) Processor family 6 model 167") == "Intel Xeon, amx"
    assert named("AMD EPYC family 25 model 17") == "AMD EPYC, amx"
    assert named("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz family 6 model 143") == "Intel Xeon Platinum 8481C, amx"


def test_every_stored_answer_of_a_processor_has_its_instruction_set_in_its_name():
    for name, record in read_all(RESULTS):
        question = record.get("question", name.removesuffix("-cpu.json"))
        own = record["environment"].get("instruction_set") or record["environment"]["backend"].removeprefix("C++, ")
        assert name == file_name(question, own)
    assert all((RESULTS / file_name(question, "")).exists() for question in ON_ANY)


def test_the_page_shows_what_is_stored():
    page = measured.DOCUMENT.read_text()
    assert measured.written(page) == page, "python -m benchmarks.measured"


def test_a_page_without_a_table_is_refused():
    with pytest.raises(ValueError, match="measured.md must hold <!-- cpu --> and <!-- /cpu --> once"):
        measured.written("")


# ---------------------------------------------------------------------------------------------- the question cpu


def test_bounds_are_those_of_the_instruction_set_and_dtype():
    assert [column(name, "bf16") for name in ("amx", "avx512_bf16", "avx512", "avx2")] == [AMX, AVX512_BF16, None, None]
    assert [column(name, "fp32") for name in ("amx", "avx512_bf16", "avx512", "avx2")] == [FP32, FP32, FP32, None]
    cell = ("step", (4096, 4096), 64)
    assert bound("amx", "bf16", *cell, 2, HELD) == 0.9
    assert bound("avx512_bf16", "bf16", *cell, 2, HELD) == 0.77
    assert bound("amx", "fp32", *cell, 2, FROM_SCORES) == 1.1
    assert bound("amx", "bf16", *cell, 1, HELD) is None
    assert bound("amx", "bf16", "d_x", (4096, 4096), 1, 2, HELD) is None
    assert all(len(target.bounds) == len(COLUMNS) for target in TARGETS)


def test_every_target_is_measured():
    asked = {(op, shape, m) for shape, cases in bench_cpu.MANY_THREADS for op, m in cases}
    assert {(target.op, target.shape, target.m) for target in TARGETS} <= asked


@pytest.fixture(scope="module")
def two_machines(tmp_path_factory):
    """A folder with small answers to cpu and generate; those of the second machine are the first one's, renamed."""
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
    records = by_machine(two_machines, "cpu")
    assert list(records) == ["amx", "avx2"]
    told = "\n".join(cpu_tables(records["amx"]))
    assert "| step, bf16, 4 x 64, M = 3 | ours, held mask | 1000.00 | " in told
    assert told.count("| met |") == 4  # both dtypes, with two threads and, as the bounds here have it, with one
    assert told.count("| NOT MET |") == 4
    assert "| step, fp32, 4 x 64, M = 3, 1 thread |" in told
    assert "Ceilings of the run, 1 thread: bf16 GEMM" in told
    assert cpu_tables(records["avx2"])[0] == "Nothing is asked of this instruction set beside dense."

    (speeds,) = generate_tables(by_machine(two_machines, "generate")["amx"])
    assert speeds.startswith("| tokens/s [quartiles] | bf16 | fp32 |")
    table = measured.cpu_table(records)
    assert table.splitlines()[0].count(FROM_SCORES) == 2
    (line,) = [line for line in table.splitlines() if "| step, bf16, 4 x 64, M = 3 |" in line]
    scores, held, _, scores_elsewhere, *_ = [cell.strip() for cell in line.split("|")[2:]]
    assert re.fullmatch(r"\*\*[\d.]+\*\* \(0\.00\)", scores)  # missed
    assert re.fullmatch(r"[\d.]+ \(1000\.00\)", held)
    assert scores_elsewhere == scores.split()[0].strip("*")  # where nothing is asked
    assert measured.shares_table(records).count("\n") == 1 + 8
    speeds = measured.generate_table(by_machine(two_machines, "generate"))
    assert [line.split("|")[1].strip() for line in speeds.splitlines()[2:]] == [
        *(bench_generate.DENSE, bench_generate.MODULE, bench_generate.HELD)
    ]
    assert speeds.splitlines()[0].count("bf16") == 2

    bench_cpu.conclude(two_machines / "cpu-amx.json")
    assert "NOT MET" in capsys.readouterr().out
    assert (two_machines / "cpu.png").stat().st_size > 10_000


def test_answers_of_several_processes_are_pooled(two_machines):
    record = json.loads((two_machines / "cpu-amx.json").read_text())
    found = pooled([record, record, record])
    assert found["cases"][0] | {"rounds": 0} == record["cases"][0] | {"rounds": 0}
    assert found["ceilings"] == record["ceilings"]


def test_a_masked_model_generates_the_tokens_of_its_mask():
    found = bench_generate.models(TINY.config, torch.float32)
    prompt = torch.tensor([[5, 6, 7]])
    module, held = (bench_generate.generate(found[name], prompt, 4) for name in ("ours, module", "ours, held mask"))
    assert torch.equal(module, held)
    assert module.shape == (1, 7)


def test_a_picture_is_named_as_its_record():
    assert plots.picture_of(RESULTS / "ops-cpu-amx.json") == RESULTS / "ops-amx.png"
