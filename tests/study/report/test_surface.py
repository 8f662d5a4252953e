"""Planes in weight space and the loss on them."""

import pytest
import torch
from tiny import make_llama, make_rows, masked_llama

from mft.evaluation.evaluate import evaluate
from mft_study.report.pictures.surface import loss_surface, plane_through, random_plane, weights_of

NAMES = ["model.layers.2.mlp.down_proj", "model.layers.3.self_attn.q_proj"]


def shifted(weights, amount, seed):
    generator = torch.Generator().manual_seed(seed)
    return {key: w + amount * torch.randn(w.shape, generator=generator) for key, w in weights.items()}


def point(plane, x, y):
    return {key: plane.origin[key] + x * plane.across[key] + y * plane.up[key] for key in plane.origin}


def test_the_weights_of_a_masked_layer_are_masked():
    model = masked_llama(keep_ratio=0.5)
    weights = weights_of(model, NAMES)
    for name in NAMES:
        module = model.get_submodule(name)
        assert torch.equal(weights[name] == 0, ~module.mask())
        assert torch.equal(weights[name][module.mask()], module.weight[module.mask()])


def test_rows_of_a_random_direction_are_as_long_as_the_weights():
    origin = weights_of(make_llama(), NAMES)
    origin[NAMES[0]][3] = 0
    plane = random_plane(origin, seed=1)
    for name, weight in origin.items():
        torch.testing.assert_close(plane.across[name].norm(dim=1), weight.norm(dim=1))
        torch.testing.assert_close(plane.up[name].norm(dim=1), weight.norm(dim=1))
        assert not torch.equal(plane.across[name], plane.up[name])


def test_a_plane_through_three_models_meets_them_at_their_marks_and_keeps_angles():
    first = weights_of(make_llama(), NAMES)
    models = {"fine-tune": first, "masked": shifted(first, 0.1, 1), "control": shifted(first, 0.3, 2)}
    plane = plane_through(models)
    for name, (x, y) in plane.marks.items():
        for key, weight in point(plane, x, y).items():
            torch.testing.assert_close(weight, models[name][key], rtol=1e-4, atol=1e-5)
    across, up = (torch.cat([d[key].flatten() for key in NAMES]) for d in (plane.across, plane.up))
    assert abs(across @ up) < 1e-4 * across.norm() * up.norm()
    torch.testing.assert_close(across.norm(), up.norm())


def test_models_on_one_line_span_no_plane():
    first = weights_of(make_llama(), NAMES)
    a, b = ({key: w * factor for key, w in first.items()} for factor in (2, 3))
    with pytest.raises(ValueError, match="must not lie on one line .* got one, two, three on one"):
        plane_through({"one": first, "two": a, "three": b})
    with pytest.raises(ValueError, match="models must be three"):
        plane_through({"one": first, "two": a})


def test_the_loss_at_a_mark_is_the_models_own():
    model, rows = make_llama(), make_rows(4)
    masked = masked_llama(keep_ratio=0.3)
    first = weights_of(model, NAMES)
    merged = weights_of(masked, NAMES)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plane = plane_through({"fine-tune": first, "masked": merged, "control": shifted(first, 0.1, 3)})
    surface = loss_surface(model, plane, rows, reach=1.0, points=3, first=2)
    x = surface.xs.tolist()
    # The grid reaches 1 beyond the outermost marks. Compute one of its points by hand.
    corner = make_llama()
    with torch.no_grad():
        for key, weight in point(plane, x[0], surface.ys[2].item()).items():
            corner.get_submodule(key).weight.copy_(weight)
    assert surface.losses[2, 0].item() == pytest.approx(evaluate(corner, rows).loss, rel=1e-6)
    assert x[0] == pytest.approx(min(m[0] for m in plane.marks.values()) - 1)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
