"""The kernels run in Triton's interpreter, in a process of its own, or on a GPU: TRITON_INTERPRET=1 chooses."""

import pytest
from products import CARDS, INTERPRETING, by_card


@pytest.fixture(scope="session")
def device(triton_device):
    """Where the kernels run here."""
    return triton_device


@pytest.fixture(scope="session")
def targets(device):
    """By name, whose form and tiles can be run here: those of every card in the interpreter, on a GPU its own."""
    from mft_kernels.backends.triton import target

    if not INTERPRETING:
        return {"GPU": target.target_of(device)}
    return {name: getattr(target, name) for name in CARDS}


@pytest.fixture(params=by_card())
def target(request, targets):
    """The target whose form and tiles the test runs."""
    from mft_kernels.backends.triton.target import assume

    with assume(targets[request.param]):
        yield targets[request.param]


@pytest.fixture(autouse=True, scope="module")
def outputs_begin_as_nan(poisoned_outputs):
    """In every test here."""
