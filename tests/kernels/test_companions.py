"""After a step the host waits once for the device, however many layers there are; CPU tensors stand in for its own."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from mft_kernels import MaskedLinear, outdate
from mft_kernels.mask import companions, masking
from mft_kernels.ops.checks import NonFiniteScores

LAYERS = 5
ALL = list(range(LAYERS))
X = torch.ones(2, 8)


class Machine:
    """A model that has made its first step; it counts the host's waits and lists the layers it selects from."""

    def __init__(self, monkeypatch):
        self.waits, self.selected, self.stream = 0, [], "stream 0"
        self.layers = nn.Sequential(*(MaskedLinear(8, 8, keep_ratio=0.5, init="normal") for _ in ALL))
        self.optimizer = torch.optim.SGD([layer.scores for layer in self.layers], lr=0.1)
        monkeypatch.setattr(companions, "stream_of", lambda _: self.stream)
        for name in ("__bool__", "__int__", "item", "tolist"):
            monkeypatch.setattr(Tensor, name, self.counted(getattr(Tensor, name)))
        self.launch = masking._launch
        monkeypatch.setattr(masking, "_launch", self.noted)
        assert self.forward() == (LAYERS, ALL)  # before the first step, nothing says which layers belong together
        self.step()

    def counted(self, read):
        def waits(tensor):
            self.waits += 1
            return read(tensor)

        return waits

    def noted(self, scores, *rule):
        self.selected += [place for place, layer in enumerate(self.layers) if layer.scores is scores]
        return self.launch(scores, *rule)

    def forward(self, layers=None):
        """Run forward and backward; return (waits, layers selected from). The masks used must be current."""
        self.waits, self.selected = 0, []
        layers = self.layers if layers is None else layers
        nn.Sequential(*layers)(X).square().mean().backward()
        did = self.waits, sorted(self.selected)
        for layer in layers:
            now, *_ = self.launch(layer.scores, layer.rule)
            assert torch.equal(layer.scores.memo.mask.packed, now.packed)
        return did

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.waits, self.selected = 0, []


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


def test_after_a_step_the_host_waits_once_for_the_whole_model(machine):
    for _ in range(3):
        assert machine.forward() == (1, ALL)
        assert machine.forward() == (0, [])
        machine.step()


@pytest.mark.parametrize(("rule", "value"), [("mode", "value"), ("threshold", 0.01), ("keep_ratio", 0.7)])
def test_a_rule_that_changes_for_all_layers_costs_no_further_wait(machine, rule, value):
    for layer in machine.layers:
        setattr(layer, rule, value)
    assert machine.forward() == (1, ALL)
    machine.layers[3].keep_ratio, machine.layers[3].threshold = 0.2, None  # its own rule: selected twice, once
    machine.step()
    assert machine.forward() == (2, sorted([*ALL, 3]))
    machine.step()
    assert machine.forward() == (1, ALL)


def test_scores_that_are_not_finite_are_an_error_of_their_own_layer_alone(machine):
    for place, layer in enumerate(machine.layers):
        layer.module_name = f"layer {place}"
    machine.layers[2].scores.grad = torch.full((8, 8), torch.nan)
    machine.step()
    x = machine.layers[1](machine.layers[0](X))
    assert machine.waits == 1
    for _ in range(2):
        with pytest.raises(NonFiniteScores, match="layer 2"):
            machine.layers[2](x)
    machine.waits = 0
    machine.layers[3](x)
    assert machine.waits == 0
    with torch.no_grad():
        machine.layers[2].scores.normal_()
    machine.step()
    machine.layers[0].scores.grad = torch.full((8, 8), torch.nan)
    machine.step()
    with pytest.raises(NonFiniteScores, match="layer 0"):
        machine.layers[0](X)


def test_signs_are_none_of_those_scores_alone_of_which_one_is_zero(machine):
    with torch.no_grad():
        machine.layers[1].scores[0, 0] = 0
    machine.step()
    machine.forward()
    assert [layer.scores.memo.mask.signs is None for layer in machine.layers] == [place == 1 for place in ALL]


@pytest.mark.parametrize(
    "write",
    [
        lambda layer: layer.scores.detach().mul_(-3).sub_(0.1),
        lambda layer: layer.load_state_dict(layer.state_dict() | {"scores": torch.randn(8, 8)}),
        lambda layer: setattr(layer.scores, "data", torch.randn(8, 8)),
        lambda layer: torch.utils.swap_tensors(layer.scores, MaskedLinear(8, 8, init="normal").scores),
    ],
)
@pytest.mark.parametrize("before_the_others", [True, False])
def test_what_is_written_after_the_step_waits_for_its_own_layer(machine, write, before_the_others):
    if before_the_others:
        write(machine.layers[2])
        assert machine.forward() == (2, ALL)
    else:
        machine.layers[0](X)
        assert machine.selected == ALL
        write(machine.layers[2])
        assert machine.forward() == (1, [2])


def test_a_write_that_nothing_shows_is_told_by_outdate(machine):
    machine.layers[0](X)
    outdate(machine.layers[2].scores)
    assert machine.forward() == (1, [2])
    machine.step()
    machine.layers[0](X)
    outdate()
    assert machine.forward()[1] == ALL


def test_a_step_is_compiled_once_and_its_scores_are_companions(machine):
    torch._dynamo.reset()
    step = torch.compile(machine.optimizer.step, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(4):
            assert machine.forward() == (1, ALL)
            step()
            machine.optimizer.zero_grad()


@pytest.mark.parametrize("stepped_elsewhere", [True, False])
def test_another_stream_selects_for_itself(machine, stepped_elsewhere):
    if stepped_elsewhere:  # the first layer may have waited for that stream, but not yet the others
        machine.forward()
        machine.stream = "stream 1"
        machine.step()
        machine.stream = "stream 0"
    else:
        machine.layers[0](X)  # selects ahead on stream 0
        machine.selected = []
        machine.stream = "stream 1"
    machine.waits = 0
    machine.layers[1](X)
    assert (machine.waits, machine.selected[-1:]) == (1, [1])


def test_nothing_keeps_a_dead_layer(machine):
    machine.layers[0](X)
    scores, ahead = machine.layers[4].scores, machine.layers[4].scores.ahead
    dead = weakref.ref(scores), weakref.ref(ahead.mask.packed)
    machine.optimizer.param_groups[0]["params"].pop()
    del scores, ahead, machine.layers[4]
    gc.collect()
    assert [ref() for ref in dead] == [None, None]


def test_layers_of_several_threads_are_never_stale(machine):
    def forwards(layer):
        for _ in range(20):
            layer(X).sum().backward()
            mask = masking.current_mask(layer.scores, 0.5, None, "magnitude")
            assert torch.equal(mask.packed, machine.launch(layer.scores, layer.rule)[0].packed)

    for _ in range(10):
        with ThreadPoolExecutor(LAYERS) as threads:
            list(threads.map(forwards, machine.layers))
        for layer in machine.layers:
            layer.scores.grad = torch.randn(8, 8)
        machine.step()
