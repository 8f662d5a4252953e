"""mft.in_place: a user's own loop learns what another loop does, and leaves the base unchanged, however it ends."""

import os
import random
import signal
import time

import numpy
import pytest
import torch
import torch.distributed as dist
from tiny import assert_masks_agree, make_llama, masked_llama
from tiny_run import in_a_fork

import mft
from mft.config import MaskConfig
from mft.masks.convert import masked_modules
from mft_kernels import MaskAdamW, unpack_mask

TOKENS = torch.randint(0, 61, (4, 2, 12), generator=torch.Generator().manual_seed(0))
NEAR = 2e-5  # for scores after steps at 1e-3: dense products sum in an order of their own


def bits(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if "scores" not in name}


def loss_of(model, ids):
    return model(input_ids=ids, labels=ids).loss


def masked_loop(model, max_grad_norm=None, after=lambda step: None):
    """The comparison for in_place: the masked layers themselves, and autograd down to the scores."""
    groups = [{"params": [m.scores], "mode": m.mode} for m in masked_modules(model).values()]
    optimizer = MaskAdamW(groups, lr=1e-3, moments="fp32")
    scores = [group["params"][0] for group in groups]
    for step, ids in enumerate(TOKENS, 1):
        loss_of(model, ids).backward()
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(scores, max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        after(step)
    return model


def in_place_loop(model, after=lambda optimizer, step: None, **options):
    with mft.in_place(model, lr=1e-3, moments="fp32", **options) as optimizer:
        for step, ids in enumerate(TOKENS, 1):
            loss_of(model, ids).backward()
            optimizer.step()
            optimizer.zero_grad()
            after(optimizer, step)
    return model


def assert_learned_the_same(one, other):
    theirs = masked_modules(other)
    for name, module in masked_modules(one).items():
        assert (module.scores - theirs[name].scores).abs().max() <= NEAR, name
        assert_masks_agree(module, theirs[name], NEAR)


@pytest.mark.parametrize(
    ("mask", "norm"),
    [({}, None), ({}, 1e-3), ({"mode": "value"}, 1e-3), ({"threshold": 0.01}, None), ({"keep_ratio": 0.5}, 1e-3)],
    ids=str,
)
def test_it_learns_what_autograd_over_the_masked_layers_does(mask, norm):
    start, model = masked_llama(**mask), masked_llama(**mask)
    before = bits(model)
    in_place_loop(model, max_grad_norm=norm)
    assert_learned_the_same(model, masked_loop(masked_llama(**mask), norm))
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(model).items())
    begun = masked_modules(start)
    assert any(not torch.equal(m.mask(), begun[name].mask()) for name, m in masked_modules(model).items())


def test_under_a_budget():
    config = MaskConfig(budget=0.03, target_modules=["gate_proj", "up_proj"], layers_to_transform=[1, 2])
    one, other = (mft.mask_model(make_llama(), config) for _ in range(2))
    mft.grow_budget(other, 0, len(TOKENS))
    masked_loop(other, after=lambda step: mft.grow_budget(other, step, len(TOKENS)))
    mft.grow_budget(one, 0, len(TOKENS))
    in_place_loop(one, after=lambda optimizer, step: optimizer.grow_budget(step, len(TOKENS)))
    assert_learned_the_same(one, other)
    assert {m.threshold for m in masked_modules(one).values()} != {None}


def test_its_masks_are_those_in_the_weights():
    model = masked_llama()

    def look(optimizer, step):
        found = optimizer.packed_masks()
        assert len(found) == 14
        for name, packed in found.items():
            weight = model.get_submodule(name).weight
            assert torch.equal(weight == 0, ~unpack_mask(packed, weight.shape))

    in_place_loop(model, look)


def test_schedulers_closures_and_states_are_those_of_any_optimiser():
    model = masked_llama()
    with mft.in_place(model, lr=1e-3) as optimizer:
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=2)

        def closure():
            optimizer.zero_grad()
            loss = loss_of(model, TOKENS[0])
            loss.backward()
            return loss

        losses = [optimizer.step(closure).item(), optimizer.step(closure).item()]
        scheduler.step()
        assert losses[1] < losses[0]
        assert optimizer.param_groups[0]["lr"] > 1e-3 / 3
        state = optimizer.state_dict()
    with mft.in_place(model, lr=1e-3) as optimizer:
        optimizer.load_state_dict(state)
        assert optimizer.state_dict()["state"][0]["step"] == 2


def test_scores_that_are_not_finite_are_named_and_the_model_comes_back():
    model = masked_llama()
    before = bits(model)

    def spoil(optimizer, step):
        model.model.layers[3].mlp.down_proj.weight.grad = torch.full((32, 64), torch.nan)
        optimizer.step()

    with pytest.raises(ValueError, match=r"scores of module 'model.layers.3.mlp.down_proj' must be finite"):
        in_place_loop(model, spoil)
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(model).items())


def test_distributed_data_parallel_sums_the_weights_gradients(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        model = masked_llama()
        with mft.in_place(model, lr=1e-3, moments="fp32") as optimizer:
            parallel = torch.nn.parallel.DistributedDataParallel(model)
            for ids in TOKENS:
                loss_of(parallel, ids).backward()
                optimizer.step()
                optimizer.zero_grad()
    finally:
        dist.destroy_process_group()
    assert_learned_the_same(model, in_place_loop(masked_llama()))


@pytest.mark.slow
def test_torch_compile_takes_it_as_one_graph():
    torch.compiler.reset()
    model = masked_llama()
    with mft.in_place(model, lr=1e-3, moments="fp32") as optimizer:
        compiled = torch.compile(model, fullgraph=True)
        for ids in TOKENS:
            loss_of(compiled, ids).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_learned_the_same(model, in_place_loop(masked_llama()))


# ---------------------------------------------------------------------------------------------- wrong use


def twice(model):
    with mft.in_place(model):
        mft.in_place(model)


def moved(model):
    with mft.in_place(model) as optimizer:
        loss_of(model, TOKENS[0]).backward()
        layer = model.model.layers[2].mlp.up_proj
        layer.weight.data = layer.weight.data.clone()
        optimizer.step()


def grown(model):
    mft.merge_model(model)
    mft.mask_model(model, MaskConfig(budget=0.1))
    with mft.in_place(model):
        mft.grow_budget(model, 1, 2)


def sharp(model):
    mft.merge_model(model)
    mft.in_place(mft.mask_model(model, MaskConfig(threshold=0.0, mode="value", sharpness=10)))


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (twice, "model must not have its masks in place here.*leave mft.in_place.model. first"),
        (moved, "the weight of model.layers.2.mlp.up_proj must stay where it is.*do that before"),
        (grown, "call optimizer.grow_budget.step, steps."),
        (sharp, "mask.sharpness must be null in your own training loop.*way='in_place'"),
        (lambda model: mft.in_place(model, max_grad_norm=0.0), "max_grad_norm must be positive or None, got 0.0"),
        (lambda model: mft.in_place(model, moments="4bit"), "moments must be one of"),
    ],
    ids=lambda each: getattr(each, "__name__", None),
)
def test_wrong_use_says_what_to_do(use, words):
    model = masked_llama()
    before = bits(model)
    with pytest.raises((ValueError, RuntimeError), match=words):
        use(model)
    for name, tensor in bits(model).items():
        assert "extra_state" in name or torch.equal(tensor, before[name]) or use in (sharp, grown)


# ---------------------------------------------------------------------------------------------- killed


@pytest.mark.parametrize("kills", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_a_killed_run_alters_neither_file_nor_shared_memory(kills, tmp_path):
    """Others may read both: a mapping through which writes would reach the file, and shared memory."""
    model = masked_llama()
    weight = model.model.layers[2].mlp.up_proj.weight
    numbers = numpy.memmap(tmp_path / "file", dtype=numpy.float32, mode="w+", shape=tuple(weight.shape))
    numbers[:] = weight.detach().numpy()
    weight.data = torch.from_numpy(numbers)
    for name, module in masked_modules(model).items():
        if not name.endswith("2.mlp.up_proj"):
            module.weight.data.share_memory_()
    before, file = bits(model), (tmp_path / "file").read_bytes()
    wait = random.Random(0)

    def train_until_killed(seconds):
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, seconds)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            in_place_loop(model)
        return 0

    for _ in range(kills):
        assert in_a_fork(lambda: train_until_killed(wait.uniform(0.001, 0.3))) == -signal.SIGKILL
        assert all(torch.equal(tensor, before[name]) for name, tensor in bits(model).items())
        assert (tmp_path / "file").read_bytes() == file
