"""Ctrl-C while masks go into place, train and are restored. What must hold of the model after it is checked here.

    PYTHONPATH=.:python:tests python tests/in_place/interrupts.py --interrupts 60

sends real interrupts (SIGINT) to child processes at random moments of the start, the steps and the end of
mft.in_place's block, until 60 have met it, and prints what they left.
"""

import argparse
import collections
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import masked_llama

import mft
from mft.masks.in_place.model import masks_in_place

IDS = torch.arange(12).unsqueeze(0)
PHASES = ("start", "steps", "end")
LATE = "after the block"


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


# ---------------------------------------------------------------------------------------------- real interrupts


def train(model, enter):
    """Train in a block; enter(phase) is called when a phase begins."""
    enter("start")
    with mft.in_place(model, lr=1e-2, moments="fp32") as optimizer:
        enter("steps")
        for _ in range(3):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        enter("end")
    enter(None)


def interrupted(phase, share, tell):
    """In a child process: train, ask for an interrupt within this phase, and return what it left."""
    model = masked_llama(layers=(0, 1, 2))  # 21 masked layers
    begins, reached = {}, []
    for _ in range(2):  # the second time is like the third
        train(model, lambda each: begins.update({each: time.monotonic()}))
    length = dict(zip(PHASES, map(float.__rsub__, begins.values(), list(begins.values())[1:])))[phase]
    before = Before(model)

    def enter(each):
        reached.append(each)
        if each == phase:
            tell(share * length)
        if each is None:
            time.sleep(30)  # the interrupt comes late

    try:
        train(model, enter)
        raise AssertionError("the interrupt did not come")
    except KeyboardInterrupt:
        at = reached[-1] or LATE
    found = "restored" if masks_in_place(model) is None else "refused, then restored"
    with tempfile.TemporaryDirectory() as directory:
        masks = Path(directory) / "masks"
        if masks_in_place(model) is not None:
            before.check_usable_or_refused(model, masks)
            mft.leave_in_place(model)
        before.check_restored(model)
        before.check_saved(mft.save_masks(model, masks))
    return f"{at}: {found}"


def interrupt_child(phase, share):
    """Return the exit code of a child process that this one interrupts, and its last words."""
    ask, tell = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            words = interrupted(phase, share, lambda seconds: os.write(tell, f"{seconds}\n".encode()))
            os.write(tell, words.encode())
            code = 0
        except BaseException as error:  # noqa: BLE001  (the child must end here)
            traceback.print_exc()
            os.write(tell, f"FAILED: {error!r}".encode())
        finally:
            os._exit(code)
    os.close(tell)
    with os.fdopen(ask) as said:
        seconds = said.readline().strip()
        if seconds.replace(".", "").replace("e-", "").isdigit():
            time.sleep(float(seconds))
            os.kill(child, signal.SIGINT)
        words = said.read() or seconds
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), words


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interrupts", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    draw, counts, failures = random.Random(arguments.seed), collections.Counter(), 0
    while sum(counts[words] for words in counts if not words.startswith(LATE)) < arguments.interrupts:
        code, words = interrupt_child(PHASES[counts.total() % len(PHASES)], draw.random())
        counts[words] += 1
        failures += code != 0
    for words, count in sorted(counts.items()):
        print(f"{count:4d}  {words}")
    print(f"{counts.total()} interrupts, {failures} failures")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
