"""Benchmarks: what is counted, compared and printed; no timing."""

import json
import subprocess
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny import make_llama, make_rows, masked_llama
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import bench_many_masks, bench_ops, compare, harness
from benchmarks.bench_demo import ProfilingRecorder
from benchmarks.bench_many_masks import BASE, bytes_of, loss_rows, losses_by_mask
from benchmarks.harness import Finding, Spread, report
from benchmarks.layer_competitors import (
    DENSE,
    EAGER,
    FROM_SCORES,
    HELD,
    LORA,
    MODULE,
    PAPER,
    LayerCompetitors,
    inputs_of,
)
from benchmarks.matrix_competitors import eager_pack, eager_step
from benchmarks.pooled import pooled
from benchmarks.records import by_question, file_name
from benchmarks.roofline import Ceilings, count_work
from benchmarks.step_profile import REST, kind_of, profile_step
from benchmarks.tables import many_masks_tables, markdown, ops_tables
from mft.config import TrainConfig
from mft.evaluation.evaluate import evaluate
from mft.masks.bank import load_mask_bank
from mft.masks.export import load_masks, save_masks
from mft.training.loop import finetune
from mft_kernels import kept_threshold, pack_mask, score_step

QUANTITY = "ours, from scores / dense: forward, 4 x 8, M = 2"


def spread(median, width=0.01):
    return {"median": median, "low": median - width, "high": median + width}


def record(median=1.0, width=0.01, *, quantity=QUANTITY, unit="x", **environment):
    found = [{"quantity": quantity, "measured": spread(median, width), "unit": unit}]
    return {"environment": {"device": "a", "commit": "0" * 40} | environment, "findings": found}


# ---------------------------------------------------------------------------------------------- comparing


@pytest.mark.parametrize(
    ("before", "now", "verdict"),
    [
        ((1.0, 0.01), (1.2, 0.01), "REGRESSION"),
        ((1.0, 0.01), (1.04, 0.01), ""),  # beyond the spreads, not by 5 %
        ((1.0, 0.15), (1.2, 0.10), ""),  # by more than 5 %, within the spreads
        ((1.2, 0.01), (1.0, 0.01), "better"),
    ],
)
def test_a_regression_exceeds_both_spreads_and_5_percent(before, now, verdict):
    (change,) = compare.compare(record(*before), record(*now))
    assert change.verdict == verdict


def test_new_and_missing_ratios_are_told_apart():
    changes = compare.compare(record(quantity="ours / a"), record(quantity="ours / b"))
    assert {change.quantity: change.verdict for change in changes} == {"ours / a": "MISSING", "ours / b": "new"}


def test_what_a_quick_run_leaves_out_is_not_missing():
    changes = compare.compare(record(quantity="ours / a"), record(quantity="ours / b"), partial=True)
    assert [change.verdict for change in changes] == ["new"]


@pytest.mark.parametrize(("quantity", "unit"), [("LoRA / dense: forward", "x"), (QUANTITY, "ms"), ("ours", "x")])
def test_only_ratios_of_ours_are_compared(quantity, unit):
    assert compare.ratios(record(quantity=quantity, unit=unit)) == {}


def run_compare(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["compare", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        compare.main()
    return stopped.value.code


def write(folder, content, name="ops", instruction_set=None):
    folder.mkdir(exist_ok=True)
    path = folder / file_name(name, instruction_set or harness.instruction_set())
    own = {"instruction_set": instruction_set or harness.instruction_set()} | content["environment"]
    path.write_text(json.dumps(content | {"environment": own}))
    return folder


def test_the_exit_code_tells_a_regression_and_the_table_names_it(tmp_path, monkeypatch, capsys):
    old, same = write(tmp_path / "old", record(1.0)), write(tmp_path / "same", record(1.0))
    worse = write(tmp_path / "worse", record(1.5))
    assert run_compare(monkeypatch, old, "--now", same) == 0
    assert QUANTITY not in capsys.readouterr().out
    assert run_compare(monkeypatch, old, "--now", worse) == 1
    told = capsys.readouterr().out
    assert QUANTITY in told
    assert "REGRESSION" in told


def answers_in_turn(monkeypatch, *medians):
    """Instead of measuring: each time it is asked, the next of these medians. Returns what was asked."""
    asked, left = [], list(medians)

    def answer(questions, *, quick):
        asked.append(questions)
        return {question: record(left.pop(0)) for question in questions}

    monkeypatch.setattr(compare, "_answers", answer)
    return asked


@pytest.mark.parametrize(("again", "code", "told"), [(1.5, 1, "REGRESSION"), (1.0, 0, "not repeated: 1.000")])
def test_what_seems_worse_is_measured_again_and_decides_if_it_repeats(tmp_path, monkeypatch, capsys, again, code, told):
    old = write(tmp_path / "old", record(1.0))
    asked = answers_in_turn(monkeypatch, 1.5, again)
    assert run_compare(monkeypatch, old) == code
    assert asked == [["ops"], ["ops"]]
    assert told in capsys.readouterr().out


def test_only_questions_with_suspects_are_asked_again(tmp_path, monkeypatch):
    old = write(write(tmp_path / "old", record(1.0)), record(1.0), "scaling")
    asked = answers_in_turn(monkeypatch, 1.0, 1.5, 1.5)
    assert run_compare(monkeypatch, old) == 1
    assert asked == [["ops", "scaling"], ["scaling"]]


def test_a_question_that_was_not_measured_fails(tmp_path, monkeypatch, capsys):
    old = write(write(tmp_path / "old", record()), record(), "scaling")
    assert run_compare(monkeypatch, old, "--now", write(tmp_path / "now", record())) == 1
    assert "scaling: MISSING" in capsys.readouterr().out


def with_time(median, device, ratio=1.0):
    both = record(ratio, device=device)
    both["findings"].append({"quantity": "dense", "measured": spread(median), "unit": "ms"})
    return both


def test_times_are_shown_for_one_machine_and_decide_nothing(tmp_path, monkeypatch, capsys):
    old = write(tmp_path / "old", with_time(5.0, "a"))
    assert run_compare(monkeypatch, old, "--now", write(tmp_path / "now", with_time(7.0, "a"))) == 0
    assert "(for information) dense: 5 -> 7 ms" in capsys.readouterr().out


@pytest.mark.parametrize(("ratio", "told"), [(1.5, "higher here"), (0.5, "lower here"), (1.0, "1 of 1 ratios within")])
def test_between_two_machines_nothing_is_concluded(tmp_path, monkeypatch, capsys, ratio, told):
    old = write(tmp_path / "old", with_time(5.0, "a"))
    assert run_compare(monkeypatch, old, "--now", write(tmp_path / "now", with_time(7.0, "b", ratio))) == 2
    printed = capsys.readouterr().out
    assert "!!! NOT THE SAME MACHINE: device was 'a' and is 'b'" in printed
    assert told in printed
    assert "whether the code became slower cannot be told. Measure REF here: python -m benchmarks --out" in printed
    for verdict in ("REGRESSION", "no regression", "better", "worse", "for information"):
        assert verdict not in printed


def test_answers_of_another_instruction_set_are_not_compared(tmp_path, monkeypatch, capsys):
    old = write(tmp_path / "old", record(1.0), instruction_set="avx9")
    assert run_compare(monkeypatch, old) == 2  # nothing is measured for it
    mine = harness.instruction_set()
    assert f"an instruction set that is compared, {mine}, {old} has those of avx9" in capsys.readouterr().err
    both = write(write(tmp_path / "both", record(1.0)), record(1.0), instruction_set="avx9")
    now = write(tmp_path / "now", record(1.5), instruction_set="avx9")
    assert run_compare(monkeypatch, both, "--now", now) == 1
    assert run_compare(monkeypatch, both, "--now", write(tmp_path / "same", record(1.0))) == 0


def test_a_ref_from_before_names_told_the_instruction_set_is_placed_by_its_backend(tmp_path, monkeypatch):
    old = tmp_path / "old"
    old.mkdir()
    placed = record(1.0, backend=f"C++, {harness.instruction_set()}")
    (old / "ops-cpu.json").write_text(json.dumps(placed))
    now = write(tmp_path / "now", record(1.5, backend=placed["environment"]["backend"]))
    assert run_compare(monkeypatch, old, "--now", now) == 1


def test_a_ratio_that_is_missing_on_another_machine_fails(tmp_path, monkeypatch):
    old = write(tmp_path / "old", record(quantity="ours / a", device="a"))
    now = write(tmp_path / "now", record(quantity="ours / b", device="b"))
    assert run_compare(monkeypatch, old, "--now", now) == 1


def test_another_machine_is_said_before_anything_is_measured_and_nothing_is_asked_twice(tmp_path, monkeypatch, capsys):
    old = write(tmp_path / "old", record(1.0))
    environment = {**harness.environment(), "device": "b"}
    monkeypatch.setattr(compare, "environment", lambda: environment)

    def answer(questions, *, quick):
        assert "REF was not measured on this machine (" in capsys.readouterr().out
        return {question: record(1.5, device="b") for question in questions}

    monkeypatch.setattr(compare, "_answers", answer)
    assert run_compare(monkeypatch, old) == 2
    assert "asked again" not in capsys.readouterr().out


def test_a_ref_is_a_commit_whose_results_are_read(tmp_path, monkeypatch):
    def git(*arguments):
        named = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *named, *arguments], cwd=tmp_path, check=True, capture_output=True)

    results = tmp_path / "benchmarks" / "results"
    results.parent.mkdir()
    write(results, record(2.0))
    git("init")
    git("add", ".")
    git("commit", "-m", "results")
    write(results, record(3.0))
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    monkeypatch.setattr(compare, "RESULTS", results)
    found = by_question(compare.read_ref("HEAD"), harness.instruction_set())
    assert found["ops"]["findings"][0]["measured"]["median"] == 2.0
    with pytest.raises(ValueError, match="REF must be a folder of results or a git ref, got 'nowhere'"):
        compare.read_ref("nowhere")


# ---------------------------------------------------------------------------------------------- records and tables


def test_a_record_reads_back_and_gives_each_finding_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "_folder", tmp_path)
    findings = [Finding("a", Spread(1.23456789, 1.0, 2.0)), Finding("b", Spread(1.0, 1.0, 1.0), "ms", "at most", 2)]
    path = report("ops", "Title", findings, printed=False, cases=[{"m": 1}])
    stored = json.loads(path.read_text())
    assert stored["findings"][0]["measured"]["median"] == 1.23457
    assert stored["findings"][1]["met"] is True
    assert stored["cases"] == [{"m": 1}]
    assert {"device", "threads", "torch", "commit", "backend"} <= stored["environment"].keys()
    assert sum('"quantity"' in line for line in path.read_text().splitlines()) == 2


def test_a_case_of_ops_is_printed_once_with_every_competitor(capsys):
    measured = bench_ops.Measured()
    case = bench_ops.Case("forward", 4, 8, 512)
    times = {DENSE: [1.0, 2.0], FROM_SCORES: [2.0, 4.0], EAGER: [3.0, 6.0], LORA: [1.5, 3.0]}
    measured.add(case, DENSE, {}, times)
    measured.add(case, DENSE, {}, {DENSE: [1.1, 2.1], PAPER: [11.0, 21.0]})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("forward, 4 x 8, M = 512: 1.500 ")
    assert [line.split()[0] for line in lines[1:]] == ["2.000", "3.000", "1.500", "10.0"]
    assert [line.split("x  ")[1] for line in lines[1:]] == [FROM_SCORES, EAGER, LORA, PAPER]
    assert [finding.quantity for finding in measured.findings] == [f"{FROM_SCORES} / {DENSE}: {case}"]


def test_the_table_of_ops_has_a_row_a_shape_and_competitor():
    def case(name, m, ratio):
        own = {"op": "forward", "n": 4, "k": 8, "m": m, "competitor": name, "ms": spread(1.0), "ratio": spread(ratio)}
        return own | {"share": 0.5}

    once = case("ours", 0, 2.0) | {"op": "threshold"}
    cases = [case("dense", 1, 1.0), case("ours", 1, 1.25), case("ours", 8, 1.5), once]
    forward, at_once, _ = ops_tables({"cases": cases, "ceilings": {}})
    assert "| 4 x 8 | ours | 1.25 (50) | 1.5 (50) |" in forward
    assert "dense |" not in forward
    assert "| threshold | 4 x 8 | ours | 1 | 2 (50) |" in at_once


def test_markdown_aligns_numbers_to_the_right():
    assert markdown(["a", "b"], [["x", "1"]]) == "| a | b |\n|---|---:|\n| x | 1 |"


# ---------------------------------------------------------------------------------------------- roofline


def test_work_counts_each_operand_once():
    forward = count_work("forward", "scores", 2, 4, 8)
    assert forward.flops == 2 * 2 * 4 * 8
    assert forward.bytes == 4 * 8 * (2 + 2) + 2 * 2 * (4 + 8)
    assert count_work("threshold", "scores", 0, 4, 8).bytes == 4 * 8 * 2
    step = count_work("step", "dense", 2, 4, 8)
    assert step.flops == 3 * forward.flops
    assert count_work("step", "dense", 2, 4, 8, torch.float32).bytes == 2 * step.bytes
    held = count_work("forward", "held", 2, 4, 8, torch.float32)
    assert held.bytes == 4 * 8 * (4 + 1 / 8) + 4 * 2 * (4 + 8)


def test_the_share_is_of_the_ceiling_that_binds():
    ceilings = Ceilings()
    ceilings.gemm, ceilings.copy = [1e9], [1e9]
    assert ceilings.share(count_work("forward", "dense", 1, 1000, 1000), 4.0) == pytest.approx(2.004e6 / 4e6)
    assert ceilings.share(count_work("forward", "dense", 1000, 1000, 1000), 4e3) == pytest.approx(0.5)


# ---------------------------------------------------------------------------------------------- competitors


@pytest.mark.parametrize("op", ["d_x", "d_scores", "step"])
@pytest.mark.parametrize("name", [DENSE, FROM_SCORES, MODULE, HELD, EAGER, PAPER, LORA])
def test_every_competitor_makes_the_gradients_that_are_asked(name, op):
    n, k, m = 24, 40, 3
    found = LayerCompetitors(n, k).call(name, op, inputs_of(m, n, k))()
    learned = {HELD: [], LORA: [(16, k), (n, 16)]}.get(name, [(n, k)])
    wanted = {"d_x": [(m, k)], "d_scores": learned, "step": [(m, k), *learned]}[op]
    assert [tuple(grad.shape) for grad in found or []] == wanted


@pytest.mark.parametrize(("op", "products"), [("d_x", 1), ("d_scores", 1), ("step", 3)])
def test_the_eager_form_does_no_product_that_nobody_asks_for(op, products):
    call = LayerCompetitors(24, 40).call(EAGER, op, inputs_of(3, 24, 40))
    with FlopCounterMode(display=False) as counter:
        call()
    assert counter.get_total_flops() == products * 2 * 3 * 24 * 40


def test_the_held_mask_makes_no_score_gradient_for_d_x(monkeypatch):
    def refuse(*_):
        raise AssertionError("d_x alone was asked for")

    call = LayerCompetitors(24, 40).call(HELD, "d_x", inputs_of(3, 24, 40))
    monkeypatch.setattr("mft_kernels.held.accumulate_score_grad", refuse)
    call()


def test_the_formulations_from_scores_agree():
    n, k = 24, 64
    made, inputs = LayerCompetitors(n, k), inputs_of(5, n, k)
    results = {name: made.call(name, "step", inputs)() for name in (FROM_SCORES, EAGER, PAPER)}
    for name in (EAGER, PAPER):
        for ours, theirs in zip(results[FROM_SCORES], results[name]):
            # The paper's layer multiplies by the gradient of |scores|, as we by the sign; bf16 sums differ in order.
            torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.02)
    held = made.call(HELD, "forward", inputs)()
    torch.testing.assert_close(held, made.call(FROM_SCORES, "forward", inputs)(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", [DENSE, FROM_SCORES, MODULE, HELD, EAGER, LORA])
def test_every_competitor_runs_in_fp32_too(name):
    call = LayerCompetitors(24, 40, torch.float32).call(name, "step", inputs_of(3, 24, 40, torch.float32))
    assert all(grad.dtype == torch.float32 for grad in call() or [])


def test_the_eager_packing_is_the_packed_mask():
    scores = torch.randn(6, 96).bfloat16()
    threshold = kept_threshold(scores, 0.9)
    assert torch.equal(eager_pack(scores, threshold), pack_mask(scores, threshold))


def test_the_eager_optimiser_step_is_ours_late_in_a_run():
    torch.manual_seed(0)
    grad, weight = torch.randn(4, 32), torch.randn(4, 32)
    start = [0.02 * torch.randn(4, 32), 0.1 * torch.randn(4, 32), 0.1 + torch.rand(4, 32)]
    ours, theirs = ([tensor.clone() for tensor in start] for _ in range(2))
    score_step(ours[0], grad, weight, ours[1], ours[2], step=100_000, lr=3e-4)
    eager_step(*theirs, grad, weight)
    torch.testing.assert_close(ours, theirs)


def test_an_operator_belongs_to_the_nearest_kind_above_it():
    def event(name, parent=None):
        return SimpleNamespace(name=name, cpu_parent=parent)

    optimiser = event("Optimizer.step#AdamW.step")
    assert kind_of(event("aten::mul", optimiser)) == "optimiser"
    assert kind_of(event("aten::mm", event("aten::linear"))) == "products"
    assert kind_of(event("aten::add")) == REST


def test_the_kinds_of_a_profile_add_up_to_its_time():
    a = torch.ones(600, 600)
    start = time.perf_counter()
    spent = profile_step(lambda: [a @ a for _ in range(20)])
    took = (time.perf_counter() - start) * 1e3
    assert 0 < spent["products"] < sum(spent.values()) < took
    assert spent["attention"] == spent["optimiser"] == 0


def test_the_demos_phases_are_profiled_by_what_they_do():
    recorder, rows, model, train = ProfilingRecorder(), make_rows(8), make_llama(), TrainConfig(steps=13)
    begin = time.perf_counter()
    with recorder.training("full fine-tune", rows, train) as on_step:
        finetune(model, rows, train, on_step=on_step)
    took = time.perf_counter() - begin
    assert len(recorder.curves["full fine-tune"]) == 13
    assert all(recorder.seconds["training"][kind] > 0 for kind in ("products", "attention", "optimiser", "loss"))
    assert 0 < sum(recorder.seconds["training"].values()) < took - recorder.profiling
    assert sum(recorder.seconds["evaluating"].values()) == 0
    loss = recorder.evaluate("test", model, rows, batch_size=1).loss
    assert loss == evaluate(model, rows, batch_size=1).loss
    assert recorder.seconds["evaluating"]["products"] > 0
    assert recorder.seconds["evaluating"]["optimiser"] == 0


def test_pooled_records_span_every_process():
    def record(median, met, rounds):
        spread = {"median": median, "low": median - 1, "high": median + 1}
        finding = {
            "quantity": "ours / dense",
            "measured": spread,
            "unit": "x",
            "rule": "at most",
            "bound": 2,
            "met": met,
        }
        return {
            "title": "t",
            "environment": {"date": str(median)},
            "cases": [{"m": 8, "rounds": rounds}],
            "findings": [finding],
        }

    found = pooled([record(3.0, False, 2), record(1.0, True, 3), record(1.5, True, 2)])
    assert found["findings"][0]["measured"] == {"median": 1.5, "low": 0.0, "high": 4.0}
    assert found["cases"] == [{"m": 8, "rounds": 7}]
    assert found["environment"] == {"date": "3.0"}
    other = record(1.0, True, 2)
    other["findings"][0]["quantity"] = "theirs"
    with pytest.raises(ValueError, match="every process must give the same quantity, got ours / dense, theirs"):
        pooled([record(1.0, True, 2), other])
    with pytest.raises(ValueError, match="every process must give the same cases"):
        pooled([record(1.0, True, 2), record(1.0, True, 2) | {"cases": []}])


# ---------------------------------------------------------------------------------------------- many masks


@pytest.fixture
def exports(tmp_path):
    return {task: save_masks(masked_llama(keep_ratio=0.5, seed=len(task)), tmp_path / task) for task in ("a", "bb")}


def test_every_task_is_evaluated_under_the_base_and_every_mask(exports):
    data = {"a": make_rows(4), "bb": make_rows(6, seed=1)}
    found = losses_by_mask(load_mask_bank(make_llama(), exports), data, first=2)
    for task, rows in data.items():
        assert list(found[task]) == [BASE, "a", "bb"]
        assert found[task][BASE].loss == pytest.approx(evaluate(make_llama(), rows).loss, rel=1e-6)
        for mask, directory in exports.items():
            alone = evaluate(load_masks(make_llama(), directory), rows).loss
            assert found[task][mask].loss == pytest.approx(alone, rel=1e-6)
            assert abs(alone - found[task][BASE].loss) > 1e-4


def test_the_table_of_many_masks_shows_losses_differences_and_bytes(exports):
    bank = load_mask_bank(make_llama(), exports)
    losses = losses_by_mask(bank, {"a": make_rows(4)}, first=2)
    sizes = bytes_of(bank)
    assert sizes["masks in memory"] == sizes["masks in memory, computed"] == sum(bank.nbytes().values()) > 0
    table, memory = many_masks_tables({"losses": loss_rows(losses), "bytes": sizes})
    header, _, row = table.splitlines()
    assert header == "| held-out loss of | base | a | bb |"
    base, other = losses["a"][BASE].loss, losses["a"]["bb"].loss
    assert row.startswith(f"| a | {base:.4f} | ")
    assert f" | {other:.4f} ({other - base:+.4f} ± " in row
    assert f"| masks in memory | {sizes['masks in memory']:,d} |" in memory


def test_the_question_of_many_masks_is_answered(smollm2_dir, tokenizer, tmp_path, monkeypatch, capsys):
    def load_small(name):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
            config = LlamaConfig(**sizes, vocab_size=len(tokenizer), num_hidden_layers=30, tie_word_embeddings=True)
            return LlamaForCausalLM(config).eval(), tokenizer

    monkeypatch.setattr(bench_many_masks, "load_model", load_small)
    for name, value in {"STEPS": 2, "SECONDS": 0.0, "SCORED": 16, "PROMPT": 4, "GENERATED": 2}.items():
        monkeypatch.setattr(bench_many_masks, name, value)
    monkeypatch.setattr(harness, "_folder", tmp_path)
    short = {"max_train_tokens": 4 * 128, "max_eval_tokens": 4 * 128}
    tasks = {task: replace(config, **short) for task, config in bench_many_masks.TASKS.items()}
    monkeypatch.setattr(bench_many_masks, "TASKS", tasks)
    bench_many_masks.main()
    record = json.loads((tmp_path / file_name("many_masks", harness.instruction_set())).read_text())
    assert len(record["losses"]) == 12
    found = {finding["quantity"]: finding["measured"]["median"] for finding in record["findings"]}
    assert found["bank's loss against the merged model's, largest difference"] < 1e-4
    assert found["scoring: merged model"] > 0
    assert found["mixed batch / merged model: generating"] > 0
    assert record["bytes"]["masks in memory"] == 3 * 6 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64) // 8
    assert record["bytes"]["masks in memory, all layers"] == 5 * record["bytes"]["masks in memory"]
