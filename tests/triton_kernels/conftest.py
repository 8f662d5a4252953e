"""The kernels run in Triton's interpreter, in a process of its own, or on a GPU: TRITON_INTERPRET=1 chooses."""

import pytest
from products import CARDS, INTERPRETING, by_card


@pytest.fixture(scope="session")
def device(triton_device):
    """Return the device on which the kernels run."""
    return triton_device


@pytest.fixture(scope="session")
def targets(device):
    """Return the targets that can run here, by name: every card's in the interpreter, only its own on a GPU."""
    from mft_kernels.backends.triton import target

    if not INTERPRETING:
        return {"GPU": target.target_of(device)}
    return {name: getattr(target, name) for name in CARDS}


@pytest.fixture(params=by_card())
def target(request, targets):
    """Return the target whose form and tiles the test runs."""
    from mft_kernels.backends.triton.target import assume

    with assume(targets[request.param]):
        yield targets[request.param]


@pytest.fixture(autouse=True, scope="module")
def outputs_begin_as_nan(poisoned_outputs):
    """Fill outputs with NaN in every test of this folder."""
