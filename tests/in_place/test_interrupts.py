"""Interrupts at every line of the code that puts masks in place and restores the model."""

import contextlib
import itertools
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_mixtures import mixture

import mft
from mft.masks.in_place.model import masks_in_place, use_masked_layers

PARTS = ("masks/in_place/layer.py", "masks/in_place/model.py", "masks/masked_experts.py", "engines/in_place")
PRODUCT = tuple(str(Path(mft.__file__).parent / part) for part in PARTS)


class Before:
    """What a masked model was before its masks were in place."""

    def __init__(self, model):
        self.masked = mft.masked_modules(model)
        self.weights = {name: module.weight.clone() for name, module in self.masked.items()}
        self.state = _weights_in(model.state_dict())

    def check_restored(self, model):
        assert mft.masked_modules(model) == self.masked, "other layers are masked than before"
        for name, module in self.masked.items():
            assert torch.equal(module.weight, self.weights[name]), f"{name} has another weight"
            assert module.scores.requires_grad, f"{name} does not train"
        model.load_state_dict(model.state_dict())  # a layer that still was in place would refuse

    def check_usable_or_refused(self, model, directory):
        """Check that every use of a model that is not restored is right, or an error that names the remedy."""
        for use in (mft.masked_modules, mft.in_place, mft.merge_model):
            with pytest.raises(RuntimeError, match=r"call mft.leave_in_place\(model\)"):
                use(model)
        with contextlib.suppress(RuntimeError):
            model.load_state_dict(model.state_dict())
        found = _weights_in(model.state_dict())
        assert found.keys() == self.state.keys(), "state_dict has other names"
        assert all(torch.equal(tensor, self.state[name]) for name, tensor in found.items()), "state_dict lost a weight"
        with contextlib.suppress(RuntimeError):
            self.check_saved(mft.save_masks(model, directory))

    def check_saved(self, directory):
        saved = load_file(directory / "adapter_model.safetensors")
        missing = [name for name in self.masked if not any(name in entry for entry in saved)]
        assert not missing, f"save_masks left out {len(missing)} of {len(self.masked)} layers"


def _weights_in(state):
    return {name: tensor.clone() for name, tensor in state.items() if not name.endswith(("scores", "_extra_state"))}


class Interrupts(contextlib.AbstractContextManager):
    """Raises KeyboardInterrupt in this context before a line of the product is run, or a function of it is entered.

    Args: waits: how many such places are passed before each interrupt.
    """

    def __init__(self, *waits):
        self.waits = list(waits)

    def __enter__(self):
        self.before = sys.gettrace(), sys.getprofile()
        sys.settrace(self.trace)
        sys.setprofile(self.trace_again)

    def __exit__(self, *_):
        sys.settrace(self.before[0])
        sys.setprofile(self.before[1])

    def trace(self, frame, event, _):
        if not frame.f_code.co_filename.startswith(PRODUCT):
            return None
        if event in ("call", "line") and self.waits:
            if self.waits[0] == 0:
                self.waits.pop(0)
                raise KeyboardInterrupt
            self.waits[0] -= 1
        return self.trace

    def trace_again(self, frame, event, _):
        """Go on after an interrupt: Python stops tracing when a tracer raises."""
        if event == "call" and self.waits and sys.gettrace() is None:
            sys.settrace(self.trace)
            frame.f_trace = self.trace(frame, event, None)


def start(model, interrupts):
    with interrupts:
        mft.in_place(model)


def close(model, interrupts):
    optimizer = mft.in_place(model)
    with interrupts:
        optimizer.close()


def save(model, interrupts):
    mft.in_place(model)
    with interrupts, use_masked_layers(model):
        assert len(mft.masked_modules(model)) == 3


@pytest.mark.parametrize("use", [start, close, save], ids=lambda each: each.__name__)
def test_an_interrupted_model_is_restored_or_says_that_it_is_not(use, tmp_path):
    model = mixture("GptOss", num_hidden_layers=1)
    config = {"target_modules": ["o_proj"], "target_parameters": ["gate_up_proj", "down_proj"]}
    before, refused = Before(mft.mask_model(model, mft.MaskConfig.paper(**config))), 0
    for place in itertools.count():
        for waits in [(place,), (place, 0), (place, place)][: 3 if place % 15 == 0 else 1]:  # some a second time
            interrupts = Interrupts(*waits)
            with contextlib.suppress(KeyboardInterrupt):
                use(model, interrupts)
            if masks_in_place(model) is not None:
                refused += 1
                before.check_usable_or_refused(model, tmp_path / "masks")
                mft.leave_in_place(model)
            before.check_restored(model)
        if len(interrupts.waits) == len(waits):
            break
    assert refused
