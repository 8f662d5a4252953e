"""Stored results by machine: names, what is read again, and the page that shows them next to each other."""

import json
import re
import sys

import pytest
import torch

from benchmarks import (
    bench_cpu,
    bench_decode,
    bench_experts,
    bench_generate,
    bench_launch,
    harness,
    measured,
    plots,
)
from benchmarks.compare import ratios
from benchmarks.cpu_targets import AMX, AVX512_BF16, COLUMNS, FP32, TARGETS, bound, column
from benchmarks.layer_competitors import FROM_SCORES, HELD
from benchmarks.pooled import pooled
from benchmarks.records import ON_ANY, RESULTS, by_machine, by_question, file_name, instruction_sets, machine, read_all
from benchmarks.tables import cpu_tables, experts_tables, generate_tables, launch_tables
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


def test_help_writes_no_page(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(measured, "DOCUMENT", tmp_path / "measured.md")
    monkeypatch.setattr(sys, "argv", ["measured", "--help"])
    with pytest.raises(SystemExit):
        measured.main()
    assert "Write the tables of docs/reference/measured.md" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_page_without_a_table_is_refused():
    with pytest.raises(ValueError, match="measured.md must hold <!-- cpu --> and <!-- /cpu --> once"):
        measured.written("")


def test_the_page_says_how_a_question_is_answered_that_no_machine_has(tmp_path):
    page = measured.written(measured.DOCUMENT.read_text(), tmp_path)
    for question in ("cpu", "launch"):
        assert f"No machine has answered this yet: `make bench WHAT={question}`" in page


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
    records = by_machine(two_machines, "cpu")
    assert list(records) == ["amx", "avx2"]
    told = "\n".join(cpu_tables(records["amx"]))
    assert "| step, bf16, 4 x 64, M = 3 | ours, held mask | 1000.00 | " in told
    assert told.count("| met |") == 4  # both dtypes, with two threads and, because these bounds include it, with one
    assert told.count("| NOT MET |") == 4
    assert "| step, fp32, 4 x 64, M = 3, 1 thread |" in told
    assert "Ceilings of the run, 1 thread: bf16 GEMM" in told
    assert cpu_tables(records["avx2"])[0] == "Nothing is asked of this instruction set beside dense."

    (speeds,) = generate_tables(by_machine(two_machines, "generate")["amx"])
    assert speeds.startswith("| tokens/s [quartiles] | bf16 | fp32 |")
    table = measured.cpu_table(records)
    assert table.splitlines()[0].count(FROM_SCORES) == 2
    (line,) = [line for line in table.splitlines() if "| step, bf16, 4 x 64, M = 3 |" in line]
    in_place, scores, held, _, _, scores_elsewhere, *_ = [cell.strip() for cell in line.split("|")[2:]]
    assert re.fullmatch(r"[\d.]+", in_place)
    assert re.fullmatch(r"\*\*[\d.]+\*\* \(0\.00\)", scores)  # missed
    assert re.fullmatch(r"[\d.]+ \(1000\.00\)", held)
    assert scores_elsewhere == scores.split()[0].strip("*")  # there is no target for this machine
    assert measured.shares_table(records).count("\n") == 1 + 8
    speeds = measured.generate_table(by_machine(two_machines, "generate"))
    assert [line.split("|")[1].strip() for line in speeds.splitlines()[2:]] == [
        *(bench_generate.DENSE, bench_generate.MODULE, bench_generate.HELD, *bench_generate.QUANTIZED)
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


def test_the_question_of_rows_with_masks_of_their_own_is_answered(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "_folder", tmp_path)
    bench_decode.main(budget=bench_decode.Budget(prompt=3, new=2, seconds=0.0, config=TINY.config))
    (record,) = by_machine(tmp_path, "decode").values()
    (table,) = generate_tables(record)
    assert "| ours, 8 tasks in a batch | " in table
    asked = {finding["quantity"] for finding in record["findings"] if finding["rule"] is not None}
    assert asked == {
        f"{bench_decode.banked(tasks)} / merged: {dtype}" for tasks in (1, 3, 8) for dtype in ("bf16", "fp32")
    }


def test_a_picture_is_named_as_its_record():
    assert plots.picture_of(RESULTS / "ops-cpu-amx.json") == RESULTS / "ops-amx.png"


# ---------------------------------------------------------------------------------------------- the question experts


def test_dense_and_masked_modules_compute_the_same_where_all_is_kept():
    for size in FEW_AND_MANY:
        made = bench_experts.Competitors(size, torch.float32)
        for layer in made.layers:
            layer.keep_ratio = 1.0
        made._held = [(layer.packed_mask(), torch.zeros_like(layer.weight)) for layer in made.layers]
        for op in ("forward", "step"):
            found = {name: call() for name, call in made.calls(op, 1).items()}
            expected = found.pop("grouped_mm")
            for got in found.values():
                both = zip([got], [expected]) if op == "forward" else zip(got[:2], expected[:2])
                for a, b in both:
                    assert torch.allclose(a, b, atol=1e-6)
        for (_, buffer), d_weight in zip(made._held, expected[2:]):
            assert torch.allclose(buffer, d_weight, atol=1e-6)


def test_the_question_of_experts_is_answered(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "_folder", tmp_path)
    bench_experts.main(budget=bench_experts.Budget(sizes=FEW_AND_MANY, tokens=(1, 5), seconds=0.0, least=1))
    (record,) = by_machine(tmp_path, "experts").values()
    (table,) = experts_tables(record)
    assert table.count("\n") == 1 + 2 * 2 * 3
    for case in record["cases"]:
        case["ratio"]["median"] = 1.16
    assert experts_tables(record)[0].count("**1.16**") == 2 * 2 * 3 * 2
    asked = [finding for finding in record["findings"] if finding["bound"] == bench_experts.BOUND]
    assert len(asked) == len(record["findings"])
    path = tmp_path / file_name("experts", harness.instruction_set())
    plots.draw_experts(path)
    assert plots.picture_of(path).stat().st_size > 0


# ---------------------------------------------------------------------------------------------- the question launch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_launch_calls_is_one_masked_layer_that_learns(dtype):
    made = bench_launch.layers(dtype)
    masked, held = made[bench_launch.LAYER], made[bench_launch.HELD_LAYER]
    x = torch.randn(1, bench_launch.SIDE, dtype=dtype)
    expected = masked.merge()(x)
    for name in bench_launch.OURS:
        torch.testing.assert_close(made[name](x), expected)
    assert not torch.equal(made[bench_launch.DENSE_LAYER](x), expected)

    budget = bench_launch.Budget(rounds=1, calls=1)
    bench_launch.time_calls(made, dtype, bench_launch.GRAD, budget)
    assert masked.scores.grad is None
    bench_launch.time_calls(made, dtype, bench_launch.STEP, budget)
    assert masked.scores.grad.any()
    assert held._held[1].any()


def test_launch_tells_ours_above_nn_linear_in_every_situation(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "_folder", tmp_path)
    goals = {"without grad": 1e6, "under inference_mode": 1e6, "with grad": -1e6, "forward + backward": None}
    assert goals.keys() == bench_launch.GOALS.keys() == bench_launch.MODES.keys()
    monkeypatch.setattr(bench_launch, "GOALS", goals)
    bench_launch.main(budget=bench_launch.Budget(rounds=2, calls=1))
    records = by_machine(tmp_path, "launch")
    (record,) = records.values()
    assert record["environment"]["threads"] == 1
    assert len(record["calls"]) == 2 * 4 * 4
    assert len(ratios(record)) == 2 * 4 * 3
    assert pooled([record, record])["calls"][1] == record["calls"][1] | {"rounds": 4}

    bf16, fp32 = launch_tables(record)
    assert bf16.count("| met |") == fp32.count("| met |") == 2 * 3
    assert fp32.count("| NOT MET |") == 3
    table = measured.launch_table(records)
    assert re.search(r"\| without grad: MaskedLinear - nn.Linear \| -?[\d.e+,]+ \(1e\+06\) \|", table)
    assert re.search(r"\| with grad: MaskedLinear, held - nn.Linear \| \*\*-?[\d.e+,]+\*\* \(-1e\+06\) \|", table)
    assert table.count("\n") == 1 + 4 * 4


def test_times_of_launch_are_taken_round_by_round():
    samples = {"nn.Linear": [0.001, 0.004, 0.002], "MaskedLinear": [0.021, 0.025, 0.020]}
    dense, ours = bench_launch.rows_of("fp32", bench_launch.GRAD, samples)
    assert dense["above"] is None
    assert dense["us"]["median"] == pytest.approx(2.0)
    assert ours["above"]["median"] == pytest.approx(20.0)  # from 20, 21 and 18; the medians differ by 19
    _, above, ratio = bench_launch.findings_of(ours, samples)
    assert above.row() == ("MaskedLinear - nn.Linear: with grad, fp32", "20.0 [19.0, 20.5] us", "at most 35", "met")
    assert (ratio.quantity, ratio.measured.median) == ("ours, MaskedLinear / nn.Linear: with grad, fp32", 10.0)
