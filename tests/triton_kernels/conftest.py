"""The kernels run in Triton's interpreter, in a process of its own, or on a GPU: TRITON_INTERPRET=1 chooses."""

import os

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="session")
def device():
    """Where the kernels run here; skips with the reason where they cannot."""
    if INTERPRETING:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no GPU; TRITON_INTERPRET=1 runs these tests in the interpreter (make test does both)")
    return torch.device("cuda")


@pytest.fixture(scope="session")
def targets(device):
    """By name, whose form and tiles can be run here: those of every card in the interpreter, on a GPU its own."""
    from mft_kernels.backends.triton import target

    if not INTERPRETING:
        return {"GPU": target.target_of(device)}
    return {name: getattr(target, name) for name in CARDS}


CARDS = ("INTERPRETER", "A100", "H100", "H100_OLD_TRITON", "B200", "MI300X")


@pytest.fixture(params=CARDS if INTERPRETING else ["GPU"])
def target(request, targets):
    """The target whose form and tiles the test runs."""
    from mft_kernels.backends.triton.target import assume

    with assume(targets[request.param]):
        yield targets[request.param]


@pytest.fixture(autouse=True, scope="module")
def poisoned_outputs():
    """What the ops allocate begins as NaN, so that an element that no tile writes is seen."""
    new_empty = torch.Tensor.new_empty

    def poisoned(*args, **kwargs):
        memory = new_empty(*args, **kwargs)
        return memory.fill_(torch.nan) if memory.is_floating_point() else memory

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", poisoned)
        yield
