"""Studies with experts in one parameter: importance by hand, one-shot masks, and weights trained by name."""

import pytest
import torch
import torch.nn.functional as F
from tiny import padded_rows
from tiny_architectures import MIXTURES

from mft.config import IMPORTANCE_METHODS, MaskConfig, TrainConfig
from mft.importance.importance import importance
from mft.importance.initial_scores import initialise_scores
from mft.masks.convert import mask_model, masked_modules
from mft.models.causal_lm import clone_with_own_weights
from mft.models.routed_experts import expert_projections
from mft.training.loop import train_loop
from mft_study.arms.weights import clone_with_weights
from mft_study.one_shot import one_shot_mask
from mft_study.peft_methods import add_adapter, lora_options, merge_adapter

UP, DOWN = (f"model.layers.1.mlp.experts.{part}" for part in ("gate_up_proj", "down_proj"))
ALL = {"rows": 6, "batch_size": 4}


@pytest.fixture(params=["olmoe", "gpt_oss"], ids=["(E, N, K)", "(E, K, N)"])
def model(request):
    return MIXTURES[request.param](num_hidden_layers=2, intermediate_size=24).eval()


def _as_linears(experts, part):
    """Return the weight (E, N, K), and the bias (E, N) or None for each expert."""
    projection = expert_projections(experts)[part]
    weight = getattr(experts, part).detach()
    bias = getattr(experts, projection.bias).detach() if projection.bias else [None] * len(weight)
    return weight.mT if projection.transposed else weight, bias


@torch.no_grad()
def _wanda_by_hand(model, rows):
    experts = model.model.layers[1].mlp.experts
    seen = []
    handle = experts.register_forward_pre_hook(lambda module, args: seen.append(args[:2]))
    for n, ids in enumerate(rows["input_ids"]):
        model(torch.tensor([ids[: 12 - n]]))
    handle.remove()
    hidden, chosen = (torch.cat(parts) for parts in zip(*seen))
    (up, up_bias), (down, _) = _as_linears(experts, "gate_up_proj"), _as_linears(experts, "down_proj")
    found = {UP: [], DOWN: []}
    for e in range(len(up)):
        x = hidden[(chosen == e).any(1)]
        found[UP].append(up[e].abs() * x.norm(dim=0))
        gated = experts._apply_gate(F.linear(x, up[e], up_bias[e]))
        found[DOWN].append(down[e].abs() * gated.norm(dim=0))
    return {name: torch.stack(parts) for name, parts in found.items()}


def test_wanda_takes_the_rows_that_each_expert_sees_without_padding(model):
    rows = padded_rows()
    expected = _wanda_by_hand(model, rows)
    found = importance(model, [UP, DOWN], "wanda", rows, **ALL)
    kinds = [type(m) for m in model.modules()]
    for name in (UP, DOWN):
        torch.testing.assert_close(found[name], expected[name])
    assert [type(m) for m in model.modules()] == kinds
    masked = mask_model(model, MaskConfig(target_parameters=["experts.gate_up_proj", "experts.down_proj"]))
    of_masked = importance(masked, [UP, DOWN], "wanda", rows, **ALL)
    for name in (UP, DOWN):
        torch.testing.assert_close(of_masked[name], expected[name])


@pytest.mark.parametrize("method", IMPORTANCE_METHODS)
def test_each_expert_keeps_its_share_by_every_method(model, method):
    mask = MaskConfig(target_parameters=["experts.gate_up_proj"], keep_ratio=0.75)
    found = importance(model, [UP], method, padded_rows(), **ALL)[UP]
    transposed = expert_projections(model.model.layers[1].mlp.experts)["gate_up_proj"].transposed
    masked = one_shot_mask(model, mask, method, padded_rows(), **ALL)
    kept = masked_modules(masked)[UP].mask()
    kept = kept.mT if transposed else kept
    for values, keep in zip(found, kept):
        assert abs(keep.float().mean() - 0.75) < (0.05 if method != "magnitude_rows" else 0.3)
        if method == "wanda":
            assert keep.sum(1).eq(24).all()  # 24 of the 32 inputs of each output
        else:
            assert values[keep].min() >= values[~keep].max()


@pytest.mark.parametrize("method", ["magnitude", "wanda", "fisher"])
def test_scores_that_will_be_trained_have_one_scale_in_every_expert(model, method):
    masked = mask_model(model, MaskConfig(target_parameters=["experts.down_proj"], keep_ratio=0.75))
    initialise_scores(masked, method, padded_rows(), **ALL)
    scores = masked_modules(masked)[DOWN].scores.detach()
    assert scores.gt(0).all()
    torch.testing.assert_close(scores.square().mean((1, 2)).sqrt(), torch.full((4,), 0.02), rtol=1e-4, atol=0)


def test_a_clones_experts_are_trained_and_put_back_by_their_parameters_name(model):
    before = model.get_parameter(UP).detach().clone()
    clone = clone_with_own_weights(model, [UP])
    assert clone.get_parameter(DOWN) is model.get_parameter(DOWN)
    clone.requires_grad_(False).get_parameter(UP).requires_grad_(True)
    train_loop(clone, padded_rows(), TrainConfig(steps=1, lr=1e-2, batch_size=2))
    trained = clone.get_parameter(UP).detach()
    assert not torch.equal(trained, before)
    assert torch.equal(model.get_parameter(UP), before)
    again = clone_with_weights(model, {UP: trained})
    assert torch.equal(again.get_parameter(UP), trained)
    assert torch.equal(model.get_parameter(UP), before)


def test_lora_on_experts_and_its_merge(model):
    base, q = clone_with_own_weights(model), "model.layers.1.self_attn.q_proj"
    ids = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    plain = model(ids).logits
    around = add_adapter(base, [q, UP, DOWN], lora_options(2))
    adapted = around.get_base_model()
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(trained) == 6
    assert torch.equal(adapted(ids).logits, plain)
    train_loop(adapted, padded_rows(), TrainConfig(steps=2, lr=1e-2, batch_size=2))
    out = adapted(ids).logits
    assert not torch.allclose(out, plain, atol=1e-3)
    merged, _ = merge_adapter(around)
    assert {name for name, _ in merged.named_parameters()} == {name for name, _ in model.named_parameters()}
    assert [type(m) for m in merged.modules()] == [type(m) for m in model.modules()]
    torch.testing.assert_close(merged(ids).logits, out, rtol=1e-4, atol=1e-5)
    assert torch.equal(model(ids).logits, plain)
