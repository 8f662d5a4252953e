"""MaskAdamW is torch's AdamW if nothing is rounded, and resumes, schedules and refuses as an optimiser should."""

import copy
import pickle

import pytest
import torch
from score_steps import normal
from torch.utils._python_dispatch import TorchDispatchMode

from mft_kernels import MaskAdamW, MaskedLinear, fixed_from_float, kept_threshold, pack_mask
from mft_kernels.backends import cpu
from mft_kernels.mask.masking import current_mask

BACKENDS = ("reference", *([] if cpu.unavailable else ["cpu"]))
SCORES = (torch.float32, torch.bfloat16, torch.int16)
MOMENTS = ("fp32", "8bit")


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    monkeypatch.setenv("MFT_KERNELS", request.param)
    return request.param


def parameter(shape, dtype=torch.float32, seed=0):
    wide = 0.02 * normal(*shape, seed=seed)
    if dtype == torch.int16:
        return torch.nn.Parameter(fixed_from_float(wide), requires_grad=False)
    return torch.nn.Parameter(wide.to(dtype))


def gradient(step, shape):
    return normal(*shape, seed=1000 + step) * normal(shape[0], *[1] * (len(shape) - 1), seed=step).exp()


def warm_up_then_down(step):
    return min(1.0, (step + 1) / 5) * (1 - step / 60)


@pytest.mark.parametrize(
    ("shape", "count", "weight_decay"), [((61, 103), 1, 0.0), ((61, 103), 1, 0.1), ((257, 1031), 2, 0.1)]
)
def test_fp32_is_torch_s_adamw_bit_for_bit(backend, shape, count, weight_decay, threads):
    """Also on threads, which share the last shape within a vector, and with the schedules of torch."""
    p, q = parameter(shape), parameter(shape)
    options = {"lr": 3e-3, "betas": (0.9, 0.98), "weight_decay": weight_decay}
    ours = MaskAdamW([p], moments="fp32", **options)
    theirs = torch.optim.AdamW([q], foreach=False, fused=False, **options)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, warm_up_then_down) for o in (ours, theirs)]
    threads(count)
    for i in range(40 if count == 1 else 3):
        p.grad = gradient(i, shape)
        q.grad = p.grad.clone()
        for thing in (ours, theirs, *schedules):
            thing.step()
        assert torch.equal(p, q)
    assert torch.equal(ours.state[p]["exp_avg_sq"], theirs.state[q]["exp_avg_sq"])


def test_step_one_is_torch_s_adamw_on_the_gradient_times_weight_and_sign(backend):
    shape, weight, threshold = (40, 70), 0.02 * normal(40, 70, seed=5), None
    p, q = parameter(shape), parameter(shape)
    ours = MaskAdamW([p], lr=3e-3, moments="fp32")
    theirs = torch.optim.AdamW([q], lr=3e-3, weight_decay=0.0, foreach=False, fused=False)
    for i in range(30):
        grad = gradient(i, shape)
        q.grad = grad * weight * q.detach().sign()
        theirs.step()
        threshold, packed = ours.step_one(p, grad, weight, keep_ratio=0.9, threshold=threshold)
        assert torch.equal(p, q)
        assert torch.equal(threshold, kept_threshold(q, 0.9))
        assert torch.equal(packed, pack_mask(q, threshold))


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (7,), (3, 5, 300), (0, 4)])
def test_step_takes_parameters_of_any_shape(backend, shape, dtype, moments):
    p = torch.nn.Parameter(torch.full(shape, 0.5).to(dtype))
    optimizer = MaskAdamW([p], lr=0.1, moments=moments)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.allclose(p.float(), torch.full(shape, 0.4), atol=4e-3)
    assert optimizer.state[p]["exp_avg"].shape == p.shape


def test_a_closure_is_run_with_gradients_and_its_loss_returned():
    p = parameter((4, 4))
    optimizer = MaskAdamW([p])

    def closure():
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    before = (p * p).sum().item()
    assert optimizer.step(closure).item() == before
    assert (p * p).sum().item() < before


def test_a_parameter_without_a_gradient_is_left_alone():
    p, q = parameter((4, 4)), parameter((4, 4))
    optimizer = MaskAdamW([p, q])
    p.grad = torch.ones_like(p)
    before = q.detach().clone()
    optimizer.step()
    assert torch.equal(q, before)
    assert not optimizer.state[q]


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("dtype", SCORES)
def test_a_resumed_run_repeats_bit_for_bit(tmp_path, dtype, moments):
    def steps(optimizer, params, first, last):
        for i in range(first, last):
            for place, p in enumerate(params):
                optimizer.step_one(p, gradient(i * 10 + place, p.shape), normal(*p.shape, seed=place))

    params = [parameter((9, 300), dtype, seed) for seed in range(2)]
    optimizer = MaskAdamW([{"params": [params[0]], "lr": 1e-3}, {"params": [params[1]]}], moments=moments, seed=3)
    steps(optimizer, params, 0, 4)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    copies = [torch.nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad) for p in params]
    steps(optimizer, params, 4, 8)

    resumed = MaskAdamW([{"params": [p]} for p in copies], moments="fp32", lr=7.0)  # options come from the state
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for p, q in zip(params, copies):
        for name, tensor in optimizer.tensors(p).items():
            assert resumed.tensors(q)[name].dtype == tensor.dtype
    steps(resumed, copies, 4, 8)
    for p, q in zip(params, copies):
        for name, tensor in optimizer.tensors(p).items():
            assert torch.equal(resumed.tensors(q)[name], tensor), name


def test_a_loaded_state_is_a_copy():
    p, q = parameter((4, 300)), parameter((4, 300))
    first, second = MaskAdamW([p]), MaskAdamW([q])
    first.step_one(p, gradient(0, p.shape))
    second.load_state_dict(first.state_dict())
    before = first.state[p]["exp_avg"].clone()
    second.step_one(q, gradient(1, q.shape))
    assert torch.equal(first.state[p]["exp_avg"], before)


# ------------------------------------------------------------------------------------------------------ CUDA graphs


@pytest.fixture
def captured(monkeypatch):
    """Return a function; after its call, torch reports that a CUDA graph is being captured."""

    def begin():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

    return begin


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("dtype", SCORES)
def test_steps_counted_on_the_device_are_the_same_bit_for_bit(backend, dtype, moments):
    p, q = parameter((9, 300), dtype), parameter((9, 300), dtype)
    options = {"moments": moments, "weight_decay": 0.01, "seed": 3}
    lr = torch.tensor(0.0, dtype=torch.float64)
    ours, theirs = MaskAdamW([p], lr=lr, capturable=True, **options), MaskAdamW([q], **options)
    hints = [None, None]
    for i in range(8):
        theirs.param_groups[0]["lr"] = 1e-3 * warm_up_then_down(i)
        lr.fill_(theirs.param_groups[0]["lr"])
        grad, weight = gradient(i, p.shape), normal(*p.shape, seed=9)
        found = [
            optimizer.step_one(each, grad, weight, keep_ratio=0.9, threshold=hint)
            for optimizer, each, hint in zip((ours, theirs), (p, q), hints)
        ]
        hints = [threshold for threshold, _ in found]
        assert all(torch.equal(a, b) for a, b in zip(*found))
        for name, tensor in theirs.tensors(q).items():
            assert torch.equal(ours.tensors(p)[name], tensor), name
    assert torch.equal(ours.state[p]["step"], torch.tensor(8))


@pytest.mark.parametrize("capturable", [False, True])
def test_only_a_capturable_step_is_captured(captured, capturable):
    layer = MaskedLinear(64, 8, keep_ratio=0.5)
    scores = layer.scores
    optimizer = MaskAdamW([scores], capturable=capturable)
    scores.grad = torch.ones(8, 64)
    optimizer.step()
    counter = optimizer.state[scores]["step"]
    captured()
    for step in (optimizer.step, lambda: optimizer.step_one(scores, torch.ones(8, 64))):
        if capturable:
            scores.in_graph = False
            step()
            assert scores.in_graph  # the mask is not remembered, as a replay would outdate it
        else:
            with pytest.raises(RuntimeError, match=r"capturable must be True .* got False.*capturable=True"):
                step()
    assert optimizer.state[scores]["step"] == (3 if capturable else 1)
    assert not capturable or optimizer.state[scores]["step"] is counter  # which a replay increments


class Launches(TorchDispatchMode):
    """Counts the ops that are not views."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("lr", [1e-3, torch.tensor(1e-3)], ids=["number", "tensor"])
@pytest.mark.parametrize("moments", MOMENTS)
def test_a_step_counted_on_the_device_launches_one_op_per_further_matrix(monkeypatch, moments, lr):
    inside = Launches()

    def kernel(update):
        with inside:
            _, clock = update.by_clock()
        assert clock[0] == 2
        return update.scores.new_empty(0), update.scores.new_empty(0, dtype=torch.int32)

    def launches(matrices):
        params = [parameter((2, 3)) for _ in range(matrices)]
        for p in params:
            p.grad = torch.ones(2, 3)
        optimizer = MaskAdamW(params, moments=moments, lr=lr, capturable=True)
        optimizer.step()
        inside.count = 0
        with monkeypatch.context() as patch, Launches() as outside:
            patch.setattr("mft_kernels.ops.step.choose", lambda *_, **__: kernel)
            optimizer.step()
        assert all(optimizer.state[p]["step"] == 2 for p in params)
        return inside.count + outside.count

    one = launches(1)
    assert one <= 21
    assert launches(6) == one + 5


def test_matrices_of_a_group_keep_clocks_of_their_own():
    """One has missed steps, and one is refused, which counts for none but those before it."""
    ours = [parameter((4, 300), torch.bfloat16, seed) for seed in range(3)]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    optimizers = [MaskAdamW(params, capturable=on) for params, on in ((ours, True), (theirs, False))]
    for i in range(4):
        for params, optimizer in zip((ours, theirs), optimizers):
            for place, p in enumerate(params):
                p.grad = None if place == 1 and i % 2 else gradient(i + place, p.shape).to(p.dtype)
            if i == 3:
                params[2].grad = params[2].grad.to_sparse()
                with pytest.raises(TypeError, match="grad must be dense"):
                    optimizer.step()
            else:
                optimizer.step()
    assert [int(optimizers[0].state[p]["step"]) for p in ours] == [4, 2, 3]
    assert [optimizers[1].state[p]["step"] for p in theirs] == [4, 2, 3]
    assert all(map(torch.equal, ours, theirs))


def test_moments_are_not_made_in_a_capture(captured):
    p = parameter((4, 4))
    optimizer = MaskAdamW([p], capturable=True)
    captured()
    with pytest.raises(RuntimeError, match=r"must have taken a step before .* got one of shape \(4, 4\)"):
        optimizer.step_one(p, torch.ones(4, 4))


@pytest.mark.parametrize(("before", "after"), [(False, True), (True, False), (True, True)])
def test_a_state_goes_on_where_steps_are_counted_elsewhere(tmp_path, before, after):
    p = parameter((4, 300), torch.bfloat16)
    first = MaskAdamW([p], lr=torch.tensor(1e-3) if before else 1e-3, capturable=before)
    first.step_one(p, gradient(0, p.shape))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    q = torch.nn.Parameter(p.detach().clone())
    second = MaskAdamW([q], capturable=after)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.param_groups[0]["capturable"] is after
    for optimizer, each in ((first, p), (second, q)):
        optimizer.step_one(each, gradient(1, p.shape))
        assert optimizer.state[each]["step"] == 2
    assert isinstance(second.state[q]["step"], torch.Tensor) is after
    assert torch.equal(p, q)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copied_optimizer_goes_on_alike(duplicate):
    p = parameter((5, 300), torch.bfloat16)
    optimizer = MaskAdamW([p])
    optimizer.step_one(p, gradient(0, p.shape))
    other = duplicate(optimizer)
    (q,) = other.param_groups[0]["params"]
    optimizer.step_one(p, gradient(1, p.shape))
    other.step_one(q, gradient(1, p.shape))
    assert torch.equal(p, q)


@pytest.mark.parametrize("moments", MOMENTS)
def test_copies_are_stepped_in_place_of_what_rests(backend, moments):
    p, q = parameter((6, 300), torch.int16), parameter((6, 300), torch.int16)
    resting, streamed = MaskAdamW([p], moments=moments), MaskAdamW([q], moments=moments)
    for i in range(3):
        grad, weight = gradient(i, p.shape), normal(*p.shape, seed=9)
        want = resting.step_one(p, grad, weight, keep_ratio=0.9)
        at_rest = streamed.tensors(q)
        before = {name: tensor.clone() for name, tensor in at_rest.items()}
        copies = {name: tensor.clone() for name, tensor in at_rest.items()}
        got = streamed.step_one(q, grad, weight, tensors=copies, keep_ratio=0.9)
        assert all(torch.equal(at_rest[name], tensor) for name, tensor in before.items())
        for name, tensor in copies.items():
            at_rest[name].copy_(tensor)
        assert torch.equal(p, q)
        assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_matrices_of_one_optimizer_round_by_different_random_words():
    params = [parameter((8, 256), torch.bfloat16) for _ in range(2)]
    optimizer = MaskAdamW(params)
    for p in params:
        optimizer.step_one(p, gradient(0, p.shape))
    assert not torch.equal(*params)


def test_a_group_added_later_takes_its_options_and_its_place():
    p, q = parameter((2, 3)), parameter((2, 3))
    optimizer = MaskAdamW([p], lr=0.5)
    optimizer.add_param_group({"params": [q], "lr": 0.25, "mode": "value", "moments": "fp32"})
    optimizer.step_one(q, torch.ones(2, 3), torch.ones(2, 3))
    # In mode "value" the sign of a score is no factor: all scores move down.
    assert torch.allclose(q, parameter((2, 3)) - 0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_masked_layer_sees_the_scores_that_a_step_changed(backend, dtype):
    layer = MaskedLinear(64, 8, keep_ratio=0.5, scores_dtype=dtype)
    optimizer = MaskAdamW([layer.scores], lr=0.05)
    before = current_mask(layer.scores, 0.5, None, "magnitude").packed.clone()
    optimizer.step_one(layer.scores, normal(8, 64), normal(8, 64, seed=1))  # Optimizer.step's hooks do not run here
    now = current_mask(layer.scores, 0.5, None, "magnitude").packed
    scores = layer.scores.detach()
    assert torch.equal(now, pack_mask(scores, kept_threshold(scores, 0.5)))
    assert not torch.equal(now, before)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1e-3}, ValueError, "lr must be finite and at least 0, got -0.001"),
        ({"lr": torch.tensor(1e-3)}, TypeError, "lr must be a number, got Tensor; use float(lr)"),
        ({"betas": (0.9, 1.5)}, ValueError, "betas[1] must lie in [0, 1), got 1.5"),
        ({"betas": (0.9,)}, ValueError, "betas must be a pair, got (0.9,)"),
        ({"eps": -1.0}, ValueError, "eps must be finite and at least 0, got -1.0"),
        ({"weight_decay": float("inf")}, ValueError, "weight_decay must be finite and at least 0, got inf"),
        ({"moments": "bf16"}, ValueError, "moments must be one of ('8bit', 'fp32'), got 'bf16'"),
        ({"mode": "sign"}, ValueError, "mode must be one of ('magnitude', 'value'), got 'sign'"),
        ({"seed": 2**31}, ValueError, "seed must be an integer in [0, 2^31), got 2147483648"),
    ],
)
def test_a_wrong_option_is_refused_by_name(options, error, message):
    with pytest.raises(error) as caught:
        MaskAdamW([parameter((2, 2))], **options)
    assert message in str(caught.value)
    with pytest.raises(error):
        MaskAdamW([parameter((2, 2))]).add_param_group({"params": [parameter((2, 2))], **options})


def test_parameters_of_another_dtype_or_layout_are_refused_and_not_added():
    optimizer = MaskAdamW([parameter((2, 2))])
    with pytest.raises(TypeError, match="params must be float32, bfloat16"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2, 2).half())]})
    with pytest.raises(ValueError, match="params must be contiguous, got strides"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2, 3).T)]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_refused_step_does_not_count():
    p = parameter((2, 2))
    optimizer = MaskAdamW([p])
    with pytest.raises(ValueError, match="grad must match scores"):
        optimizer.step_one(p, torch.zeros(2, 3))
    with pytest.raises(TypeError, match="grad must be dense"):
        optimizer.step_one(p, torch.ones(2, 2).to_sparse())
    with pytest.raises(ValueError, match="p must be one of the optimiser's parameters, got another tensor"):
        optimizer.step_one(torch.zeros(2, 2), torch.zeros(2, 2))
    assert optimizer.state[p]["step"] == 0
