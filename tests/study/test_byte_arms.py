"""Arms by bytes: compressed arms by hand and as units, the ranks of adapters, and settings that store too much."""

import dataclasses
import math

import pytest
import torch
from test_study_arms import Ground, fine_tune
from test_study_plan import RATES, bowl, make, play
from tiny import make_llama, make_rows
from tiny_study import equal
from torch.testing import assert_close

from mft.config import MaskConfig, ModelConfig
from mft.evaluation.evaluate import evaluate
from mft.models.causal_lm import clone_with_own_weights
from mft_study.arms.fp32_steps import compute_in_fp32, learn_factors
from mft_study.arms.kinds import KINDS, make_arm
from mft_study.arms.setting import Setting
from mft_study.arms.weights import clone_with_weights
from mft_study.bases import Bases
from mft_study.study_plan import best_so_far, chosen_settings, why_no_setting
from mft_study.units.job import arm_of, ground_of, model_of
from mft_study.units.unit_run import run_test, run_unit
from mft_study.workspace import Workspace

DELTA = torch.tensor([[1.0, -2.0, 0.0], [4.0, -8.0, 0.5]])
COMPRESSED = ("bitdelta", "ternary", "sparse_delta")


@pytest.fixture(scope="module")
def ground(ground):
    ground = Ground(ground)
    for arm in ("control", "continued"):
        ground.run(arm)
    return ground


def left_of(kind, delta, *args, **options):
    """Return what a kind of compression keeps of a difference."""
    return KINDS[kind].compress(delta, *args, **options)


def start_of(ground, names):
    return {name: fine_tune(ground).get_parameter(name).detach() for name in names}


def job_of(ground, arm, **options):
    return ground.job(arm, share=None if arm.startswith("bitdelta") else 0.1, **options)


def test_bitdelta_keeps_signs_and_the_mean_size():
    scale = 15.5 / 6  # 2.578125 in bfloat16
    found = left_of("bitdelta", DELTA)
    assert torch.equal(found, 2.578125 * torch.tensor([[1.0, -1.0, 1.0], [1.0, -1.0, 1.0]]))
    assert torch.equal(left_of("bitdelta", DELTA, factor=torch.tensor([[2 / scale]]))[0, 0], torch.tensor(2.0))


def test_signs_that_are_not_there_shift_nothing():
    for delta in (torch.zeros(4, 6), torch.zeros(3, 4, 6)):
        found = left_of("bitdelta", delta + torch.eye(4, 6))
        assert (found.abs() == found.abs().max()).all()
        assert (found.sum(-1).abs() <= 2 * found.max()).all()


def test_ternary_gives_the_largest_their_mean_size_and_the_others_none():
    assert torch.equal(
        left_of("ternary", DELTA, 0.5),
        torch.tensor([[0.0, -14 / 3, 0.0], [14 / 3, -14 / 3, 0.0]]).bfloat16().float(),
    )


def test_sparse_delta_keeps_the_largest_as_they_are():
    assert torch.equal(left_of("sparse_delta", DELTA, 0.4), torch.tensor([[0.0, 0.0, 0.0], [4.0, -8.0, 0.0]]))


@pytest.mark.parametrize("kind", ["ternary", "sparse_delta"])
def test_as_many_are_kept_as_the_share_says_of_equal_ones_too_and_one_at_the_least(kind):
    for share, count in ((0.25, 25), (1.0, 100), (1e-9, 1)):
        assert left_of(kind, torch.ones(10, 10), share).count_nonzero() == count


@pytest.mark.parametrize("kind", COMPRESSED)
def test_each_expert_is_a_matrix_of_its_own(kind):
    experts = torch.stack([DELTA, 100 * DELTA.flip(0)])
    found = left_of(kind, experts, 0.5, factor=torch.tensor([1.0, 2.0]).reshape(2, 1, 1))
    assert torch.equal(found[0], left_of(kind, DELTA, 0.5))
    assert torch.equal(found[1], left_of(kind, experts[1], 0.5, factor=torch.tensor([[2.0]])))


@pytest.mark.parametrize("kind", COMPRESSED)
def test_what_is_kept_has_16_bits(kind):
    generator = torch.Generator().manual_seed(0)
    for shape in ((20, 30), (7,)):
        delta = torch.randn(shape, generator=generator)
        found = left_of(kind, delta, 0.3)
        assert torch.equal(found, found.bfloat16().float())
        if len(shape) == 1:  # a vector keeps all its numbers
            assert_close(found, delta, rtol=2**-8, atol=0)


def test_a_delta_does_not_vanish_in_bfloat16_weights():
    base, name = make_llama(torch.bfloat16), "model.layers.3.mlp.up_proj"
    before = base.get_parameter(f"{name}.weight").clone()
    weight = before.float() + before.float().abs() * 2**-10  # at most a quarter of bfloat16's step
    assert torch.equal(weight.bfloat16(), before)
    model = clone_with_weights(
        compute_in_fp32(clone_with_own_weights(base), [f"{name}.weight"]), {f"{name}.weight": weight}
    )
    x = torch.randn(5, before.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(model.get_submodule(name)(x), torch.nn.functional.linear(x.float(), weight).bfloat16())
    ids = make_rows(4).with_format("torch")[:]["input_ids"]
    with torch.no_grad():
        assert model(ids).logits.dtype == torch.bfloat16
        assert not torch.equal(model(ids).logits, base(ids).logits)
    assert torch.equal(base.get_parameter(f"{name}.weight"), before)
    learned = learn_factors(
        compute_in_fp32(clone_with_own_weights(base), [f"{name}.weight"]), {f"{name}.weight": weight - before.float()}
    )
    with torch.no_grad():
        assert torch.equal(learned(ids).logits, model(ids).logits)


@pytest.mark.parametrize("arm", ["ternary", "bitdelta trained"])
def test_a_bfloat16_control_is_compressed_beside_its_start(ground, arm):
    model = ModelConfig(str(ground.directory / "model"), dtype="bfloat16")
    study = dataclasses.replace(ground.workspace.study, model=model)
    workspace = Workspace(study, Bases(study, ground.directory))
    job = job_of(ground, arm)
    found = run_unit(workspace, job)
    model = model_of(workspace, job)
    own = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert own == set(ground.weights("control"))
    assert found.loss == pytest.approx(run_unit(ground.workspace, job).loss, abs=0.05)


@pytest.mark.parametrize("arm", COMPRESSED)
def test_a_compressed_arm_is_the_start_and_what_is_left_of_its_source(ground, arm):
    job = job_of(ground, arm)
    found = run_unit(ground.workspace, job)
    control = ground.weights("control")
    start, model = start_of(ground, control), model_of(ground.workspace, job)
    for name, end in control.items():
        assert torch.equal(model.get_parameter(name), start[name] + left_of(arm, end - start[name], 0.1)), name
    others = {name for name, p in fine_tune(ground).named_parameters() if p is not model.get_parameter(name)}
    assert others == set(control)
    assert found.loss == evaluate(model, ground.workspace.splits("count").validation, batch_size=8).loss
    tested = run_test(ground.workspace, job_of(ground, arm, on_test=True))
    assert tested.validation.evaluation.loss == pytest.approx(found.loss, abs=1e-6)
    assert not job.trained.exists()  # its source's weights are enough


def test_of_all_weights_each_parameter_is_compressed_and_vectors_are_kept(ground):
    job = ground.job("bitdelta of continued")
    found = run_unit(ground.workspace, job)
    continued, model = ground.weights("continued"), model_of(ground.workspace, job)
    start = start_of(ground, continued)
    assert set(continued) == {name for name, _ in model.named_parameters()}
    norm = "model.norm.weight"
    assert_close(model.get_parameter(norm), continued[norm], rtol=1e-3, atol=1e-5)  # its change is stored in 16 bits
    matrices = [weight for weight in continued.values() if weight.dim() == 2]
    vectors = [weight for weight in continued.values() if weight.dim() == 1]
    assert found.bytes == sum(math.ceil(w.numel() / 8) + 2 for w in matrices) + 2 * sum(w.numel() for w in vectors)
    assert not torch.equal(model.get_parameter(norm), start[norm])


def test_bytes_are_those_of_signs_scales_positions_and_kept_numbers(ground):
    weights = list(ground.weights("control").values())
    numel, found = [w.numel() for w in weights], {}
    for arm in COMPRESSED:
        found[arm] = run_unit(ground.workspace, job_of(ground, arm)).bytes
    assert found["bitdelta"] == sum(math.ceil(n / 8) + 2 for n in numel)
    positions = sum(math.ceil(n * 0.468996 / 8) for n in numel)  # the entropy if a tenth is kept
    kept = [round(0.1 * n) for n in numel]
    coded = {"ternary": positions + sum(math.ceil(k / 8) + 2 for k in kept), "sparse_delta": positions + 2 * sum(kept)}
    for arm, least in coded.items():
        assert 0.98 * least < found[arm] < 1.1 * least  # the coder's own bytes come on top


def test_scales_are_trained_alone_and_the_file_holds_a_factor_a_matrix(ground):
    before = {name: p.clone() for name, p in fine_tune(ground).named_parameters()}
    plain = ground.run("bitdelta")
    still, moved = (ground.run("bitdelta trained", lr=lr) for lr in (1e-9, 3e-2))
    assert still.loss == pytest.approx(plain.loss, abs=1e-5)
    assert moved.bytes == plain.bytes
    assert moved.steps > 0
    assert moved.loss < plain.loss
    factors = ground.weights("bitdelta trained", lr=3e-2)
    assert [tuple(factor.shape) for factor in factors.values()] == [(1, 1)] * len(ground.weights("control"))
    tested = ground.tested("bitdelta trained", lr=3e-2)
    assert tested.validation.evaluation.loss == pytest.approx(moved.loss, abs=1e-4)
    assert equal(dict(fine_tune(ground).named_parameters()), before)


def test_the_rank_of_adapters_is_the_settings(ground):
    found = {rank: ground.run("lora", rank=rank) for rank in (1, None)}
    assert 2 * found[1].bytes == found[None].bytes  # the arm's own rank is 2
    tested = ground.tested("lora", rank=None)
    assert tested.validation.evaluation.loss == pytest.approx(found[None].loss, abs=1e-6)


def test_a_mean_of_whole_models_is_whole_and_a_part_of_adapters_has_their_rank(ground):
    model, found = fine_tune(ground), {}
    for arm in ("lora", "part of lora", "mean of continued"):
        job = ground.job(arm)
        found[arm] = arm_of(ground.workspace, job.unit).stored_bytes(ground_of(ground.workspace, job), model)
    assert found["part of lora"] == found["lora"] + 2  # alpha
    assert found["mean of continued"] == 2 * sum(p.numel() for p in model.parameters())


BUDGET = make_arm("lora", lrs=RATES, lora_ranks=[4, 1, 2], max_bytes=250)


def study_of(arm=BUDGET, **options):
    return make({"full": make_arm("full", lrs=RATES), "arm": arm}, **options)


def better_and_larger_by_rank(study):
    """Higher ranks are better. Each rank stores 100 bytes, and the second seed stores more."""
    loss = bowl(1e-3)
    return play(
        study,
        lambda unit: loss(unit) - 0.1 * (unit.setting.rank or 0),
        size=lambda unit: 100 * (unit.setting.rank or 9) + 60 * unit.seed,
    )


def test_ranks_are_a_grid_and_one_rank_is_no_choice():
    grid = make_arm("lora", lrs=[1e-3], lora_ranks=[2, 1]).settings(MaskConfig())
    assert grid == [Setting(1e-3, 1.0, rank=1), Setting(1e-3, 1.0, rank=2)]
    assert str(grid[0]) == "lr 0.001, epochs 1, rank 1"
    assert make_arm("lora", lrs=[1e-3], lora_rank=2).settings(MaskConfig()) == [Setting(1e-3, 1.0)]


def test_what_stores_more_than_the_most_is_tried_and_not_chosen():
    study = study_of()
    done = better_and_larger_by_rank(study)
    assert (
        chosen_settings(study, done)["code"]["arm"]
        == best_so_far(study, done)["code", "arm"]
        == Setting(1e-3, 1.0, rank=2)
    )
    assert len({one.unit.setting for one in done if one.unit.arm == "arm"}) == 9
    assert {o.unit.setting for o in done if o.unit.seed == 1 and o.unit.arm == "arm"} == {Setting(1e-3, 1.0, rank=2)}
    free = study_of(make_arm("lora", lrs=RATES, lora_ranks=[4, 1, 2]))
    assert chosen_settings(free, done)["code"]["arm"] == Setting(1e-3, 1.0, rank=4)


def test_the_bytes_of_the_most_itself_are_not_too_many():
    study = study_of(make_arm("lora", lrs=RATES, lora_ranks=[4, 1, 2], max_bytes=400))
    assert chosen_settings(study, better_and_larger_by_rank(study))["code"]["arm"].rank == 4


def test_an_arm_none_of_whose_settings_is_small_enough_has_no_result_and_its_key_is_named():
    message = (
        "code, arm must have a setting that stores at most arms.arm.max_bytes = 99 bytes, the smallest "
        "(lr 0.0001, epochs 1, rank 1) stores 100: add smaller ones to its grid, or raise it"
    )
    study = study_of(make_arm("lora", lrs=RATES, lora_ranks=[1, 2], max_bytes=99), extensions=0)
    assert why_no_setting(study, better_and_larger_by_rank(study)) == {"code": {"arm": message}}
