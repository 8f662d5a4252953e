"""Trained weights in few bits: the bytes and the numbers that they encode, and arms evaluated with decoded weights."""

import json
import math

import pytest
import torch
from test_study_arms import Ground, fine_tune
from tiny_study import FULL, make_study, run_quietly

from mft.evaluation.evaluate import evaluate
from mft.files.mask_coding import coded_size
from mft.number_formats import CODED_FORMATS
from mft_kernels.codes import Nf4
from mft_study.arms.kinds import make_arm
from mft_study.arms.setting import Setting
from mft_study.number_codes import decode, encode
from mft_study.outcome import Unit
from mft_study.report.write import write_study_report
from mft_study.units.job import Job, model_of
from mft_study.units.unit_run import run_unit

BITS = {"bf16": 16, "int8": 8 + 16 / 64, "nf4": 4 + 16 / 64, "int4": 4 + 16 / 32}
# Largest error relative to a block's largest number: half of the widest gap between levels, plus rounding.
ERRORS = {"bf16": 2**-8, "int8": 0.5 / 127 + 2**-8, "nf4": 0.16, "int4": 0.5 / 7 + 2**-8}


def drawn(*shapes):
    generator = torch.Generator().manual_seed(0)
    return {f"p{i}": torch.randn(shape, generator=generator) / 100 for i, shape in enumerate(shapes)}


WEIGHTS = drawn((48, 100), (7,), (2, 20, 33), (1,))


@pytest.mark.parametrize("kind", CODED_FORMATS)
def test_numbers_come_back_rounded_in_at_most_the_bits_of_their_format(kind):
    stream = encode(WEIGHTS, kind)
    found = decode(stream, WEIGHTS, kind)
    for name, weight in WEIGHTS.items():
        assert found[name].shape == weight.shape
        assert (found[name] - weight).abs().max() <= ERRORS[kind] * weight.abs().max()
    numbers, tensors = sum(weight.numel() for weight in WEIGHTS.values()), len(WEIGHTS)
    assert 8 * len(stream) <= BITS[kind] * numbers + 8 * (3 * 5 + 4 * tensors)  # for last blocks, and headers of runs
    again = encode(found, kind)
    assert abs(len(again) - len(stream)) <= 2
    assert all((decode(again, WEIGHTS, kind)[name] - found[name]).abs().max() < 1e-4 for name in WEIGHTS)


def test_nf4_has_the_levels_that_kernels_decode():
    weight = drawn((4, 64))["p0"]
    found = decode(encode({"p": weight}, "nf4"), {"p": weight}, "nf4")["p"]
    scales = weight.abs().amax(1).bfloat16().float()
    levels = torch.tensor(Nf4.levels)
    nearest = (weight[..., None] / scales[:, None, None] - levels).abs().argmin(-1)
    codes = (nearest.view(-1, 2) * torch.tensor([16, 1])).sum(1).to(torch.uint8)
    assert torch.equal(found, Nf4(codes, [scales], weight.shape).dense())


@pytest.mark.parametrize("kind", CODED_FORMATS)
def test_numbers_of_little_entropy_take_fewer_bits(kind):
    few = {"p": torch.where(drawn((100, 100))["p0"] > 0.02, 0.5, 0.0)}  # one in 44
    stream = encode(few, kind)
    assert torch.equal(decode(stream, few, kind)["p"], few["p"])
    assert 8 * len(stream) < 0.75 * BITS[kind] * 10_000


@pytest.mark.parametrize("kind", CODED_FORMATS)
@pytest.mark.parametrize("share", [0.05, 1.0])
def test_of_a_share_the_largest_numbers_come_back_and_their_places_are_coded_as_masks(kind, share):
    stream = encode(WEIGHTS, kind, share)
    found = decode(stream, WEIGHTS, kind, share)
    places = 0
    for name, weight in WEIGHTS.items():
        count = max(1, round(share * weight.numel()))
        kept = weight.abs() >= weight.abs().flatten().topk(count).values[-1]
        assert (found[name][~kept] == 0).all()
        assert (found[name] - weight)[kept].abs().max() <= ERRORS[kind] * weight.abs().max()
        places += coded_size(kept.reshape(-1, weight.shape[-1]))
    kept = sum(max(1, round(share * weight.numel())) for weight in WEIGHTS.values())
    assert places < len(stream) <= places + BITS[kind] * kept / 8 + 5 * 7 + 16


def test_what_is_not_finite_is_not_coded():
    with pytest.raises(ValueError, match="what was trained must be finite to be coded, got nan"):
        encode({"p": torch.tensor([1.0, math.nan])}, "nf4")


@pytest.fixture(scope="module")
def ground(ground):
    ground = Ground(ground)
    for arm in ("control", "lora", "continued"):
        ground.run(arm)
    ground.workspace.study.arms |= {of: make_arm("coded", of=of[6:], formats=["nf4"]) for of in CODED}
    return ground


CODED = ("coded control", "coded lora", "coded continued")


def job_of(ground, arm, kind, share=None):
    of = ground.job(arm.removeprefix("coded "))
    setting = Setting(share=share, config=json.dumps({"format": kind}))
    path = ground.directory / f"{arm} {kind}.safetensors"
    return Job(Unit("count", arm, 0, setting), of.starts, path, source=(of.unit, of.trained))


@pytest.mark.parametrize("arm", CODED)
def test_a_coded_arm_is_evaluated_as_its_bytes_are_decoded(ground, arm):
    source = ground.run(arm.removeprefix("coded "))
    losses, sizes = {}, {}
    for kind in CODED_FORMATS:
        job = job_of(ground, arm, kind)
        found = run_unit(ground.workspace, job)
        losses[kind], sizes[kind] = found.loss, found.bytes
        rows = ground.workspace.splits("count").validation
        assert found.loss == pytest.approx(evaluate(model_of(ground.workspace, job), rows, batch_size=8).loss, abs=1e-6)
        assert found.resident == source.resident
    assert abs(losses["bf16"] - source.loss) <= abs(losses["int4"] - source.loss)
    assert losses["bf16"] == pytest.approx(source.loss, abs=1e-3)
    assert sizes["nf4"] < sizes["int8"] < sizes["bf16"] <= 1.01 * source.bytes
    sparse = run_unit(ground.workspace, job_of(ground, arm, "nf4", share=0.1))
    assert sparse.bytes < 0.3 * sizes["nf4"]
    assert sparse.loss < fine_tune_loss(ground)


def fine_tune_loss(ground):
    return evaluate(fine_tune(ground), ground.workspace.splits("count").validation, batch_size=8).loss


@pytest.mark.parametrize(
    ("arm", "resident"),
    [
        ("control", lambda numbers: 2 * numbers),
        ("mask", lambda numbers: math.ceil(numbers / 8)),
        ("wanda", lambda numbers: math.ceil(numbers / 8)),
        ("temperature", lambda numbers: 2),
    ],
)
def test_resident_bytes_are_those_of_what_lies_beside_the_start(ground, arm, resident):
    names, _ = ground.workspace.layers_of(ground.workspace.study.arms["control"])
    numbers = sum(fine_tune(ground).get_parameter(f"{name}.weight").numel() for name in names)
    assert ground.run(arm).resident == resident(numbers)


def test_what_a_method_draws_and_does_not_train_is_resident_and_not_stored(ground):
    vera = make_arm("peft", lrs=[1e-2], config={"peft_type": "VERA", "r": 4})
    ground.workspace.study.arms["vera"] = vera
    (setting,) = vera.settings(ground.workspace.study.mask)
    job = Job(Unit("count", "vera", 0, setting), ground.job("control").starts, ground.directory / "vera.safetensors")
    found = run_unit(ground.workspace, job)
    assert found.resident == found.bytes + 2 * 4 * (64 + 64)  # A and B, as wide as the widest layers, shared by all
    lora = ground.run("lora")
    assert lora.resident == lora.bytes


STUDY = (
    FULL
    + """
  control: {kind: control, lrs: [1e-2]}
  MFT: {kind: mask, lrs: [1e-2]}
  LoRA: {kind: lora, lrs: [1e-2]}
  LoRA in 4 bits: {kind: coded, of: LoRA, formats: [nf4]}
  attention: {kind: peft, lrs: [1e-2], config: {peft_type: LORA, r: 2, target_modules: [[q_proj, v_proj], [q_proj]]}}
  attention in 4 bits: {kind: coded, of: attention, formats: [nf4]}
  part of control: {kind: coded, of: control, formats: [int8, nf4], shares: [0.03, 0.1], max_bytes: 4000}
"""
)


@pytest.mark.slow
def test_a_study_of_them_chooses_formats_and_shares_and_shows_both_sizes(ground, tmp_path):
    study = make_study(ground.directory, STUDY, ["seeds=[0]"])
    found = run_quietly(study, tmp_path / "run")[0]
    write_study_report(found, tmp_path / "run", {})
    rows = json.loads((tmp_path / "run" / "table.json").read_text())["domains"]["count"]["rows"]
    by_arm = {row["arm"]: row for row in rows}
    assert by_arm["LoRA in 4 bits"]["bytes"] < 0.3 * by_arm["LoRA"]["bytes"]
    assert by_arm["LoRA in 4 bits"]["resident"] == by_arm["LoRA"]["resident"]
    assert by_arm["attention in 4 bits"]["bytes"] < 0.4 * by_arm["attention"]["bytes"]
    assert by_arm["part of control"]["bytes"] <= 4000
    assert "resident bytes" in (tmp_path / "run" / "table.md").read_text()
    chosen = found.chosen["count"]["part of control"]
    assert str(chosen).startswith(f"share {chosen.share:g}, format ")
