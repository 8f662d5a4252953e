"""SparseGPT and GPTQ compared with their definition, column by column, and the arms that use them."""

import re

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_gpt2, make_llama, padded_rows
from tiny_study import FULL, equal, make_study, run_quietly

from mft.config import MaskConfig
from mft.models.causal_lm import decoder_layers
from mft_study import compensated
from mft_study.arms.arm import Ground
from mft_study.arms.kinds import make_arm
from mft_study.arms.setting import Setting
from mft_study.compensated import GROUP, compensate, pruned, rounded, rounded_bytes
from mft_study.outcome import Unit
from mft_study.store import Store

UP, DOWN, Q = "model.layers.2.mlp.up_proj", "model.layers.2.mlp.down_proj", "model.layers.3.self_attn.q_proj"
ALL = {"rows": 6, "batch_size": 4}  # every row of padded_rows, in batches whose last one is short


@pytest.fixture
def weight():
    return torch.randn(8, 160, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def inputs():
    """Correlated inputs, the last but one always 0."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(400, 40, generator=generator) @ torch.randn(40, 160, generator=generator)
    x = x + torch.randn(400, 160, generator=generator)
    x[:, -2] = 0
    return x


def by_hand(weight, inputs, block, value_of):
    """Return the weight with value_of(columns, uncertainty, j) in column j, by removing inputs from the inverse."""
    weight, hessian = weight.double().clone(), (inputs.t() @ inputs).double()
    unused = hessian.diagonal() == 0
    weight[:, unused] = 0
    hessian += torch.diag(0.01 * hessian.diagonal().mean() + unused.double())
    inverse, frozen = torch.linalg.inv(hessian), None
    spreads = []
    left = inverse.clone()
    for _ in range(len(left)):  # the uncertainty of an input given all later ones' freedom to change
        spreads.append(left[0, 0].sqrt())
        left = (left - torch.outer(left[:, 0], left[0]) / left[0, 0])[1:, 1:]
    for j in range(weight.shape[1]):
        if j % block == 0:
            frozen = value_of(weight[:, j : j + block].clone(), torch.stack(spreads[j : j + block]))
        new = frozen(weight[:, j], j % block)
        weight[:, j + 1 :] -= torch.outer((weight[:, j] - new) / inverse[0, 0], inverse[0, 1:])
        weight[:, j] = new
        inverse = (inverse - torch.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
    return weight


def lowest_of(columns, spread):
    size = (columns / spread).abs()
    kept = size > size.flatten().kthvalue(columns.numel() // 2).values
    return lambda column, number: column * kept[:, number]


def test_sparsegpt_drops_by_weight_and_spread_and_changes_later_weights(weight, inputs):
    found = pruned(weight, inputs.t() @ inputs, 0.5)
    wanted = by_hand(weight, inputs, 128, lowest_of)
    assert torch.equal(found == 0, wanted == 0)
    torch.testing.assert_close(found, wanted.float(), rtol=1e-3, atol=1e-4)
    for columns in found.split(128, 1):
        assert int(columns.count_nonzero()) == columns.numel() // 2


@pytest.mark.parametrize(("pattern", "size", "block"), [("row", 128, 128), ("2:4", 4, 4), ("4:8", 8, 8)])
def test_sparsegpt_follows_a_pattern(weight, inputs, pattern, size, block):
    def lowest_of_rows(columns, spread):
        kept = torch.stack([lowest_of(row[None], spread)(torch.ones(1), slice(None))[0] for row in columns])
        return lambda column, number: column * kept[:, number]

    found = pruned(weight, inputs.t() @ inputs, 0.5, pattern)
    wanted = by_hand(weight, inputs, block, lowest_of_rows)
    assert torch.equal(found == 0, wanted == 0)
    torch.testing.assert_close(found, wanted.float(), rtol=1e-3, atol=1e-4)
    for columns in found.split(size, 1)[:-1]:  # the last group has an input that is always 0
        assert (columns.count_nonzero(1) == columns.shape[1] // 2).all()


def steps_by_hand(row, squares, bits):
    """Return (step, smallest) of a group: of 21 ranges, from whole to half, the one with the least error."""
    best = None
    for number in range(21):
        cut = (1 - (1 - number / 40)) / 2 * (row.max() - row.min())
        smallest = float((row.min() + cut).half())
        step = float(((row.max() - cut - smallest) / (2**bits - 1)).half())
        error = float(((nearest(row, step, smallest, bits) - row).square() * squares).sum())
        if best is None or error < best[0]:
            best = error, step, smallest
    return best[1:]


def nearest(values, step, smallest, bits):
    return ((values - smallest) / step).round().clamp(0, 2**bits - 1) * step + smallest


def rounded_by_hand(columns, squares, bits):
    found = [steps_by_hand(row.float(), squares, bits) for row in columns]
    return lambda column, number: torch.stack([nearest(w, *one, bits) for w, one in zip(column, found)])


@pytest.mark.parametrize("bits", [3, 8])
def test_gptq_rounds_what_earlier_errors_left(weight, inputs, bits):
    gram = inputs.t() @ inputs
    squares = iter(gram.diagonal().split(GROUP))
    wanted = by_hand(weight, inputs, GROUP, lambda columns, spread: rounded_by_hand(columns, next(squares), bits))
    found = rounded(weight, gram, bits, gptq=True)
    torch.testing.assert_close(found, wanted.float(), rtol=1e-3, atol=2e-3)


def test_without_gptq_each_weight_is_rounded_to_the_nearest_step(weight, inputs):
    gram = inputs.t() @ inputs
    found = rounded(weight, gram, 4, gptq=False)
    for columns, new, squares in zip(
        weight.split(GROUP, 1), found.split(GROUP, 1), gram.diagonal().split(GROUP), strict=True
    ):
        for row, new_row in zip(columns, new):
            step, smallest = steps_by_hand(row, squares, 4)
            torch.testing.assert_close(new_row, nearest(row, step, smallest, 4))


def test_making_up_for_errors_changes_products_less(weight, inputs):
    gram = inputs.t() @ inputs
    alone, together = (rounded(weight, gram, 3, gptq=gptq) for gptq in (False, True))
    error = {id(new): (inputs @ (new - weight).t()).square().sum() for new in (alone, together)}
    assert error[id(together)] < 0.6 * error[id(alone)]
    dropped = weight * lowest_of(weight, gram.diagonal().rsqrt().nan_to_num(1, posinf=1))(1, slice(None))
    assert (inputs @ (pruned(weight, gram, 0.5) - weight).t()).square().sum() < 0.6 * (
        inputs @ (dropped - weight).t()
    ).square().sum()


def test_a_constant_group_and_unused_inputs_stay_finite():
    weight, gram = torch.ones(2, 70), torch.zeros(70, 70)
    gram[0, 0] = 1.0
    for gptq in (False, True):
        assert torch.isfinite(rounded(weight, gram, 4, gptq=gptq)).all()
    assert rounded(weight, gram, 4, gptq=False)[:, 0].tolist() == [1.0, 1.0]


def inputs_by_hand(model, name, rows):
    """Return the inputs of a layer at the first 12 - i tokens of row i, one row at a time."""
    inputs = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, args, out: inputs.append(args[0][0]))
    with torch.no_grad():
        for number, ids in enumerate(rows["input_ids"]):
            model(torch.tensor([ids[: 12 - number]]))
    handle.remove()
    return torch.cat(inputs)


def test_each_layer_is_changed_for_what_the_changed_layers_before_give_it():
    model, rows = make_llama(), padded_rows()
    before = {name: model.get_submodule(name).weight.detach().clone() for name in (Q, UP, DOWN)}
    x = {name: inputs_by_hand(model, name, rows) for name in (UP, DOWN)}  # of one layer: with both as they were
    seen = []

    def change(weight, gram):
        seen.append((weight.clone(), gram))
        return weight / 2

    found = compensate(model, [Q, UP, DOWN], change, rows, **ALL)
    assert {name: id(weight) for name, weight in found.items()} == {
        name: id(model.get_submodule(name).weight) for name in (Q, UP, DOWN)
    }
    x[Q] = inputs_by_hand(model, Q, rows)  # nothing before it has changed since
    for name, (weight, gram) in zip((UP, DOWN, Q), seen, strict=True):
        assert torch.equal(weight, before[name])
        assert torch.equal(model.get_submodule(name).weight, before[name] / 2)
        torch.testing.assert_close(gram, x[name].t() @ x[name], rtol=1e-4, atol=1e-5)


def test_a_conv1d_is_changed_as_its_transpose():
    model, name = make_gpt2(), "transformer.h.1.mlp.c_fc"
    shape = model.get_submodule(name).weight.shape
    compensate(
        model, [name], lambda weight, gram: torch.arange(weight.numel()).view(weight.shape), padded_rows(), **ALL
    )
    assert torch.equal(model.get_submodule(name).weight, torch.arange(shape.numel()).view(*shape[::-1]).t().float())


def test_a_layer_outside_the_decoder_layers_is_named(monkeypatch):
    monkeypatch.setattr(compensated, "decoder_layers", lambda model: decoder_layers(model)[:3])
    with pytest.raises(ValueError, match=re.escape(f"names must be linear layers of the decoder layers, got ['{Q}']")):
        compensate(make_llama(), [UP, Q], lambda weight, gram: weight, padded_rows(), **ALL)


ARMS = (
    FULL
    + """
  sparsegpt: {kind: sparsegpt, keep_ratios: [0.5]}
  in fours: {kind: sparsegpt, pattern: "2:4"}
  kept: {kind: kept_weights, start: sparsegpt, lrs: [1e-2]}
  rounded: {kind: rounded, bits: 4}
  nearest: {kind: rounded, bits: 3, gptq: false}
  lora: {kind: lora, start: rounded, lrs: [1e-2], lora_rank: 2}
"""
)


def test_arms_are_made_and_others_begin_there(ground):
    study = make_study(ground, ARMS, ["seeds=[0]"])
    findings, _ = run_quietly(study, ground / "run")
    outcome = {one.unit.arm: one for one in findings.outcomes}
    store = Store(study, ground / "run")
    weights = {
        arm: load_file(store.trained_path(Unit("count", arm, 0, findings.chosen["count"][arm]), findings.chosen))
        for arm in ("sparsegpt", "in fours", "kept", "rounded", "nearest")
    }
    numbers = sum(weight.numel() for weight in weights["rounded"].values())
    kept = sum(int(weight.count_nonzero()) for weight in weights["sparsegpt"].values())
    assert kept == numbers / 2
    for weight in weights["in fours"].values():
        assert (weight.view(-1, 4).count_nonzero(1) == 2).all()
    assert outcome["sparsegpt"].bytes == outcome["sparsegpt"].resident == 2 * kept + numbers / 8
    for name, weight in weights["kept"].items():
        assert torch.equal(weight == 0, weights["sparsegpt"][name] == 0)
    for arm, bits in (("rounded", 4), ("nearest", 3)):
        shapes = [weight.shape for weight in weights[arm].values()]
        assert outcome[arm].bytes == sum(rounded_bytes(shape, bits) for shape in shapes)
        for weight in weights[arm].values():
            assert max(len(row.unique()) for group in weight.split(GROUP, 1) for row in group) <= 2**bits
    assert outcome["lora"].loss < outcome["rounded"].loss


def test_the_start_stays_as_it_was_and_new_weights_have_its_dtype():
    start = make_llama(torch.bfloat16)
    before = {name: p.detach().clone() for name, p in start.named_parameters()}
    arm = make_arm("rounded", bits=2)
    weights = arm.made_weights(Ground(start, start, [UP], MaskConfig(), Setting(), 0, padded_rows))
    assert equal({n: p.detach() for n, p in start.named_parameters()}, before)
    assert {name: weight.dtype for name, weight in weights.items()} == {f"{UP}.weight": torch.bfloat16}
    assert not torch.equal(weights[f"{UP}.weight"], before[f"{UP}.weight"])


def test_bytes_are_codes_and_two_numbers_per_group():
    assert rounded_bytes(torch.Size([3, 65]), 3) == 74 + 3 * 2 * 4
