"""Masks of tasks in a server's weights: each equals the merged model bit for bit, and removing it restores the base."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from served import Served, is_plain, same_bits, save_scattered, scattered
from tiny import make_llama

from mft.files.weights_hash import dtype_name
from mft.masks.convert import masked_modules
from mft.masks.export import base_hash
from mft.vllm import dropped as dropped_module
from mft.vllm.mask_flips import Flips, flips_between
from mft.vllm.slices import Slices
from mft.vllm.task_masks import Tasks


def base():
    """Return a model with weights that only a bitwise copy preserves."""
    model = make_llama(torch.bfloat16)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.view(-1)[::3] = -0.0
        model.model.layers[0].mlp.up_proj.weight.view(-1)[1::7] = torch.nan
    return model


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Return {task: (directory, merged weights by layer)}."""
    root = tmp_path_factory.mktemp("exports")
    made = {}
    for seed, task in enumerate(("code", "maths")):
        merged = save_scattered(base, root / task, seed=seed)
        made[task] = (str(root / task), merged)
    return made


@pytest.fixture
def served():
    return Served(base())


@pytest.fixture
def tasks(served, exports):
    made = Tasks(Slices(served, is_plain).find)
    made.add({task: directory for task, (directory, _) in exports.items()})
    return made


def test_each_task_is_the_merged_model_and_the_base_comes_back(served, tasks, exports):
    before = served.weights()
    assert tasks.names == ("code", "maths")
    for task in ("code", "maths", "code", None, "maths"):
        tasks.use(task)
        assert tasks.task == task
        assert same_bits(served.weights(), before | (exports[task][1] if task else {}))
    tasks.use(None)
    assert same_bits(served.weights(), before)


def test_a_task_that_comes_while_another_is_in_use_has_the_values_of_the_base(served, exports):
    tasks, before = Tasks(Slices(served, is_plain).find), served.weights()
    tasks.add({"code": exports["code"][0]})
    tasks.use("code")
    tasks.add({"maths": exports["maths"][0]})
    assert same_bits(served.weights(), before | exports["code"][1])
    tasks.use("maths")
    assert same_bits(served.weights(), before | exports["maths"][1])
    tasks.use(None)
    assert same_bits(served.weights(), before)


def test_masks_of_another_base_are_refused_all_together_unless_forced(exports):
    other = make_llama(torch.bfloat16)
    served = Served(other)
    tasks = Tasks(Slices(served, is_plain).find)
    with pytest.raises(ValueError, match=r"expected base sha256:\w+, the model's is sha256:\w+. .* pass force=True"):
        tasks.add({"code": exports["code"][0]})
    assert tasks.names == ()
    tasks.add({"code": exports["code"][0]}, force=True)
    tasks.use("code")
    tasks.use(None)
    assert same_bits(served.weights(), Served(other).weights())


def test_masks_of_another_dtype_and_of_other_shapes_are_refused(exports):
    tasks = Tasks(Slices(Served(base().float()), is_plain).find)
    with pytest.raises(ValueError, match="The model's weights are float32, those were bfloat16"):
        tasks.add({"code": exports["code"][0]})
    tasks = Tasks(Slices(Served(make_llama(torch.bfloat16, hidden_size=64)), is_plain).find)
    with pytest.raises(
        ValueError, match=r"the mask is for a weight of \(\d+, \d+\), which vLLM's Served does not take"
    ):
        tasks.add({"code": exports["code"][0]})


def test_one_damaged_export_adds_none(served, exports, tmp_path):
    shutil.copytree(exports["maths"][0], tmp_path / "maths")
    file = tmp_path / "maths" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-40] ^= 1
    file.write_bytes(content)
    tasks = Tasks(Slices(served, is_plain).find)
    with pytest.raises(ValueError, match="damaged"):
        tasks.add({"code": exports["code"][0], "maths": str(tmp_path / "maths")})
    assert tasks.names == ()


@pytest.mark.parametrize("is_cpu", [True, False])
def test_a_weight_loses_and_gets_back_its_bits_on_every_device(is_cpu):
    weight = base().model.layers[0].mlp.up_proj.weight.detach()
    bits = weight.view(-1).view(torch.int16)
    whole = bits.clone()
    places = np.arange(0, len(bits), 5, dtype=np.int32)
    dropped = dropped_module.Dropped(places, weight.view(-1)[::5].clone())
    there = SimpleNamespace(is_cpu=False, device=weight.device, view=weight.view, new_zeros=weight.new_zeros)
    dropped.drop(weight if is_cpu else there)
    assert torch.equal(bits, whole.index_fill(0, torch.from_numpy(places).long(), 0))
    dropped.put_back(weight if is_cpu else there)
    assert torch.equal(bits, whole)


@pytest.mark.parametrize("writes", [0, 1, 5, 27])
def test_an_interrupted_switch_leaves_the_old_task(served, tasks, exports, monkeypatch, writes):
    before = served.weights()
    tasks.use("code")
    interrupt_after(monkeypatch, writes)
    with pytest.raises(KeyboardInterrupt):
        tasks.use("maths")
    assert tasks.task == "code"
    assert same_bits(served.weights(), before | exports["code"][1])
    tasks.use(None)
    assert same_bits(served.weights(), before)


def interrupt_after(monkeypatch, writes):
    """Interrupt the write after the next ``writes`` writes, once."""
    put_back, left = dropped_module.Dropped.put_back, [writes]

    def interrupted(self, weight):
        left[0] -= 1
        if left[0] == -1:
            raise KeyboardInterrupt
        put_back(self, weight)

    monkeypatch.setattr(dropped_module.Dropped, "put_back", interrupted)


class Steps:
    """Masks that change from step to step, as MaskStream sends them."""

    def __init__(self):
        self.sent, self.step = {}, 0

    def next(self, seed, share=0.1):
        model = scattered(base(), share, seed)
        layers = masked_modules(model)
        masks = {name: layer.packed_mask() for name, layer in layers.items()}
        shapes = {name: tuple(layer.scores.shape) for name, layer in layers.items()}
        flips = Flips(
            self.step,
            sum(int((~layer.mask()).sum()) for layer in layers.values()),
            flips_between(self.sent, masks, shapes),
            shapes,
            {name: dtype_name(layer.weight) for name, layer in layers.items()},
            base_hash(model),
        )
        self.sent, self.step = masks, self.step + 1
        return flips, {name: layer.merged_weight() for name, layer in layers.items()}


def test_steps_of_flips_are_the_merged_model_of_each_step(served, tasks, exports):
    before, steps = served.weights(), Steps()
    tasks.use("maths")
    for seed, share in ((7, 0.1), (8, 0.2), (9, 0.05), (9, 0.05), (10, 0.1)):
        flips, merged = steps.next(seed, share)
        tasks.flip("policy", flips)
        if flips.step == 0:
            assert same_bits(served.weights(), before | exports["maths"][1])
            tasks.use("policy")
        assert same_bits(served.weights(), before | merged)
    tasks.use("code")
    flips, merged = steps.next(11)
    tasks.flip("policy", flips)  # while another task is in use
    tasks.use("policy")
    assert same_bits(served.weights(), before | merged)
    tasks.use(None)
    assert same_bits(served.weights(), before)


def test_flips_that_do_not_follow_are_refused_and_change_nothing(served, tasks):
    steps = Steps()
    first, _ = steps.next(7)
    skipped, _ = steps.next(8)
    third, _ = steps.next(9)
    tasks.flip("policy", first)
    tasks.use("policy")
    now = served.weights()
    for flips, task, words in (
        (third, "policy", "got step 2 of task 'policy', which is at step 1"),
        (skipped, "police", "got step 1 of task 'police', which is unknown"),
        (first, "policy", "new to the server, got 'policy'"),
        (Flips(1, 5, skipped.streams), "policy", "must leave 5 weights dropped, as the sender says, got"),
        (Flips(1, 5, {"head": b""}), "policy", "masked layers, got 'head'"),
        (Flips(0, 0, {}, first.shapes, first.dtypes, "sha256:1"), "other", "trained on the base that is served"),
    ):
        with pytest.raises(ValueError, match=words):
            tasks.flip(task, flips)
        assert same_bits(served.weights(), now)
    tasks.flip("policy", skipped)


def test_an_interrupted_step_is_done_and_can_be_taken_back(served, tasks, monkeypatch):
    before, steps = served.weights(), Steps()
    tasks.flip("policy", steps.next(7)[0])
    tasks.use("policy")
    interrupt_after(monkeypatch, 3)
    flips, merged = steps.next(8)
    with pytest.raises(KeyboardInterrupt):
        tasks.flip("policy", flips)
    assert same_bits(served.weights(), before | merged)
    flips, merged = steps.next(9)
    tasks.flip("policy", flips)
    assert same_bits(served.weights(), before | merged)
    tasks.use(None)
    assert same_bits(served.weights(), before)
