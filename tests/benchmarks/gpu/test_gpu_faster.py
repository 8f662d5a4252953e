"""The table by which "auto" chooses CUDA's kernels: it is written from a correct run and read by the backends."""

import json
import logging
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="the GPU suite measures Triton kernels")

from gpu_records import HERE, check, documents_of, record, results_of, sample

from benchmarks.gpu import faster_table, report
from benchmarks.gpu.cases import AUTO, AUTO_PACKED, CUDA, CUDA_CHECKS, CUDA_PACKED, FUSED, SQUARE, Case
from benchmarks.gpu.results import FAILED, MEASURED, NOT_MEASURED, REPORTED
from mft_kernels.backends import faster
from mft_kernels.backends import table as backends

BF16 = torch.bfloat16


def checks(**states):
    names = {name.replace(" ", "_"): name for name in (*CUDA_CHECKS, "cuda memcheck")}
    return [check(detail, states.get(name, MEASURED)) for name, detail in names.items()]


def timed(what, m, by_auto, by_cuda, shape=SQUARE, auto=AUTO):
    return record(what, m, {auto: sample(by_auto), CUDA: sample(by_cuda)}, shape)


def sizes_of(records, op="masked_linear"):
    found = faster_table.table(documents_of(*checks(), *records))
    return next(entry["sizes"] for entry in found["ops"] if entry["op"] == op)


def test_a_size_is_faster_where_it_is_on_every_shape():
    records = [
        timed("forward", 512, 1.0, 1.1),
        timed("forward", 2048, 1.0, 0.9),
        timed("forward", 4096, 1.0, 0.99, shape=(1024, 4096)),
        timed("forward", 4096, 1.0, 0.9),
    ]
    assert sizes_of(records) == {"512": False, "2048": True, "4096": False}


def test_a_backward_is_what_a_step_takes_beyond_its_forward():
    records = [timed("forward", 2048, 1.0, 2.0), timed("step", 2048, 3.0, 3.5)]
    assert sizes_of(records, "masked_linear_backward") == {"2048": True}
    assert sizes_of(records) == {"2048": False}


def test_selections_are_told_by_scores_and_accumulation_by_tokens():
    threshold = record("threshold", 0, {"kept_threshold": sample(1.0), "kept_threshold, cuda": sample(0.5)})
    added = [timed(what, 2048, 1.0, 0.5, auto=FUSED) for what in ("accumulate", "accumulate_product")]
    found = faster_table.table(documents_of(*checks(), threshold | {"detail": "bfloat16"}, *added))
    assert [(entry["op"], entry["dtypes"], entry["sizes"]) for entry in found["ops"]] == [
        ("accumulate_score_grad", ["bfloat16", "float32"], {"2048": True}),
        ("kept_threshold", ["bfloat16"], {str(4096 * 4096): True}),
        ("accumulate_product", ["bfloat16", "float32"], {"2048": True}),
    ]


def test_words_have_entries_of_their_own():
    times = [("forward", 1, 1.0, 0.5), ("forward", 64, 1.0, 2.0), ("step", 1, 3.0, 2.0)]
    both = [record(w, m, {AUTO_PACKED: sample(auto), CUDA_PACKED: sample(cuda)}) for w, m, auto, cuda in times]
    found = faster_table.table(documents_of(*checks(), *both))
    assert {entry["op"]: (entry["dtypes"], entry["sizes"]) for entry in found["ops"]} == {
        "masked_linear_packed": (["bfloat16"], {"1": True, "64": False}),
        "masked_linear_packed_backward": (["bfloat16"], {"1": True}),
    }


def test_there_is_no_table_of_kernels_that_were_not_found_right():
    fast = timed("forward", 2048, 1.0, 0.5)
    assert faster_table.table(documents_of(*checks(), fast)) is not None
    assert faster_table.table(documents_of(*checks())) is None
    assert faster_table.table(documents_of(fast)) is None
    for states in ({"cuda_layouts": FAILED}, {"cuda_exact": NOT_MEASURED}, {"cuda_memcheck": FAILED}):
        assert faster_table.table(documents_of(*checks(**states), fast)) is None
    wrong = timed("d_x", 64, 1.0, 0.5) | {"failures": {CUDA: "wrong: 0.5 from the eager form"}}
    assert faster_table.table(documents_of(*checks(), fast, wrong)) is None


def test_what_the_sanitizer_says_and_what_is_slow_forbid_no_kernel():
    fast = timed("forward", 2048, 1.0, 0.5)
    said = documents_of(*checks(cuda_memcheck=REPORTED), fast)
    assert faster_table.table(said)["ops"][0]["sizes"] == {"2048": True}
    slow = record("forward", 1024, {AUTO: sample(1.0)}) | {"slow": {CUDA: "no end after 60 s"}}
    assert sizes_of([timed("forward", 512, 1.0, 0.5), slow, fast]) == {"512": True, "1024": False, "2048": True}


@pytest.mark.parametrize("other", [{"device": "another card"}, {"sources": "4567"}])
def test_what_was_timed_with_other_kernels_than_those_that_were_checked_is_left_out(other):
    right = documents_of(*checks())
    assert faster_table.table([*right, *documents_of(timed("forward", 2048, 1.0, 0.5))]) is not None
    timed_later = documents_of(timed("forward", 2048, 1.0, 0.5), environment=HERE | other)
    assert faster_table.table([*right, *timed_later]) is None


def test_a_run_writes_it_beside_its_results(tmp_path):
    case, path = Case("forward", *SQUARE, 2048), tmp_path / faster_table.FASTER
    results_of(tmp_path, [case]).set(case, MEASURED, samples=timed("forward", 2048, 1.0, 0.5)["samples"])
    report.write(tmp_path)
    assert not path.exists()
    checked = [Case.of(each) for each in checks()]
    results = results_of(tmp_path, checked)
    for one in checked:
        results.set(one, MEASURED)
    report.write(tmp_path)
    stored = json.loads(path.read_text())
    assert (stored["capability"], stored["triton"], stored["ops"][0]["sizes"]) == ([9, 0], "3.6", {"2048": True})
    results.set(checked[-1], NOT_MEASURED, reason="no time")
    (tmp_path / "gpu-correctness.json").rename(tmp_path / "elsewhere.json")  # an incomplete run does not judge it
    report.write(tmp_path)
    assert path.exists()
    (tmp_path / "elsewhere.json").rename(tmp_path / "gpu-correctness.json")
    results.set(checked[0], FAILED)
    report.write(tmp_path)
    assert not path.exists()


# ---------------------------------------------------------------------------------------------- read by the backends


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """Return a function that stores a table of masked_linear; {} by default."""

    def store(sizes, **changes):
        entry = {"op": "masked_linear", "dtypes": ["bfloat16", "bfloat16"], "sizes": sizes}
        table = {"triton": faster.installed_triton(), "capability": [9, 0], "ops": [entry]} | changes
        path = tmp_path / "faster.json"
        path.write_text(json.dumps(table))
        monkeypatch.setattr(faster, "TABLE", path)
        faster._table.cache_clear()
        backends._chosen.clear()

    monkeypatch.setattr(faster, "TABLE", tmp_path / "none.json")
    faster._table.cache_clear()
    backends._chosen.clear()
    yield store
    faster._table.cache_clear()
    backends._chosen.clear()


@pytest.fixture
def card(monkeypatch):
    """Return a function that calls a GPU's table of backends; triton and cuda return their own names."""

    def backend(name, on_request=None):
        functions = {function: (lambda *_, name=name: name) for function in ("product", "score_grad")}
        return backends.Backend(name, frozenset({"cuda"}), frozenset(), functions, on_request=on_request)

    table = {"cuda": backend("cuda", "no GPU has timed it"), "triton": backend("triton")}
    monkeypatch.setattr(backends, "_TABLE", backends._TABLE | table)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))

    def chosen(tokens, dtypes=(BF16, BF16), requested="auto"):
        run = backends.choose("product", torch.device("cuda"), dtypes, requested, op="masked_linear")
        return run(torch.empty(2, tokens // 2, 4))

    return chosen


def test_without_a_table_auto_is_as_it_was(card, stored, monkeypatch):
    assert [card(tokens) for tokens in (2, 2048)] == ["triton", "triton"]
    found = backends.choose("product", torch.device("cuda"), (BF16, BF16), op="masked_linear")
    assert found is backends._TABLE["triton"].functions["product"]
    assert not faster.TABLE.exists()


def test_auto_takes_cuda_at_the_sizes_at_which_it_is_faster_and_between_them(card, stored, caplog):
    stored({"512": False, "1024": True, "4096": True})
    with caplog.at_level(logging.INFO, "mft_kernels"):
        taken = {tokens: card(tokens) for tokens in (16, 512, 700, 1024, 2000, 4096, 8192)}
    assert [tokens for tokens, name in taken.items() if name == "cuda"] == [1024, 2000, 4096]
    assert "masked_linear on cuda: cuda for the sizes that faster.json lists" in caplog.text
    assert card(2048, requested="triton") == "triton"
    assert card(2048, dtypes=(BF16, torch.float32)) == "triton"  # no other mask was timed


@pytest.mark.parametrize("first", [BF16, torch.float32], ids=str)
def test_a_short_way_leaves_to_the_table_only_the_sizes_at_which_cuda_is_faster(card, stored, monkeypatch, first):
    """Whichever call found it: a short way serves scores of all dtypes."""
    triton = replace(backends._TABLE["triton"], short={"masked_linear": lambda *_: "short"})
    monkeypatch.setitem(backends._TABLE, "triton", triton)
    monkeypatch.setattr(backends, "short_ways", {})

    def short(tokens):
        return backends.short_ways["masked_linear", BF16](torch.empty(2, tokens // 2, 4))

    assert (card(1024, (BF16, first)), short(1024)) == ("triton", "short")
    backends.short_ways.clear()
    stored({"512": False, "1024": True, "4096": True, "8192": False})
    assert card(2, (BF16, first)) == "triton"
    assert [tokens for tokens in (2, 512, 1024, 2048, 4096, 8192) if short(tokens) is None] == [1024, 2048, 4096]
    assert card(1024) == "cuda"


@pytest.mark.parametrize("changes", [{"capability": [8, 0]}, {"capability": None}, {"triton": "3.0"}])
def test_a_table_of_another_card_or_triton_is_not_read(card, stored, changes):
    stored({"1024": True, "4096": True}, **changes)
    assert card(2048) == "triton"


def test_a_card_that_cuda_refuses_keeps_triton(card, stored, monkeypatch):
    stored({"1024": True, "4096": True})
    assert card(2048) == "cuda"
    backends._chosen.clear()
    monkeypatch.setitem(backends._TABLE, "cuda", backends.Backend("cuda", frozenset({"cuda"}), frozenset(), {}))
    assert card(2048) == "triton"
