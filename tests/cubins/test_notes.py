"""Values that the launch of a cubin passes on and records, and which of them another call may replace."""

import zipfile
from types import SimpleNamespace

import pytest
import torch

from mft_kernels.backends import built
from mft_kernels.backends.triton import cubins

#: name: (argument, what the driver gets for it, its do_not_specialize); ... is an address.
ARGUMENTS = {
    "x": (torch.zeros(2), [...], False),
    "rows": (5, [5], False),
    "step": (1, [], False),  # compiled in as a constant
    "many": ((torch.zeros(3), torch.zeros(4)), [..., ...], False),
    "bias": (None, [], False),
    "seed": (1, [1], True),
    "rate": (1.0, [0x3F800000], False),
    "tile": (SimpleNamespace(base=torch.zeros(6), shape=[2, 3], strides=[3, 1]), [..., 2, 3, 3, 2, 3, 3, 1], False),
}


@pytest.fixture
def passed(monkeypatch):
    """Return the list of requests to a driver that launches nothing."""
    found = []
    monkeypatch.setattr(
        built, "cuda_ops", SimpleNamespace(add_cubin=lambda *_: 7, launch_cubin=lambda *asked: found.append(asked))
    )
    return found


def test_a_launch_notes_what_it_passes_and_what_may_change(passed, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("one", b"image")
    about = {"file": "one", "name": "kernel", "warps": 4, "shared": 0, "parameters": []}
    cubin = cubins.Cubin(cubins.Bundle(tmp_path / "a.zip", "3.9.0", "13.0", {"key": about}), "key")
    parameters = [SimpleNamespace(name=name, do_not_specialize=ARGUMENTS[name][2]) for name in ARGUMENTS]
    args = [argument for argument, _, _ in ARGUMENTS.values()]
    compiled_here = cubins.Launched("another", swapped=True)
    with cubins.watching() as watched, cubins.noting() as outer:
        with cubins.noting() as inner:
            cubin.launch(0, (3,), SimpleNamespace(params=parameters), args)
        cubins.note(compiled_here)
    cubins.note(compiled_here)

    tensors = [args[0], *args[3], args[-1].base]
    addresses = iter(tensor.data_ptr() for tensor in tensors)
    wanted = [next(addresses) if value is ... else value for _, values, _ in ARGUMENTS.values() for value in values]
    assert passed == [(7, 0, [3, 1, 1], [*wanted, 0, 0])]
    (noted,) = inner
    assert (noted.kernel, noted.swapped) == ("kernel", False)
    assert (noted.cubin, noted.grid, noted.values) == (7, *passed[0][2:])
    assert [(name, tensor.data_ptr()) for _, name, tensor in noted.addresses] == [
        (name, tensor.data_ptr()) for name, tensor in zip(("x", "many", "many", "tile"), tensors)
    ]
    assert [noted.values[at] for at, _, _ in noted.addresses] == [tensor.data_ptr() for tensor in tensors]
    assert {name: noted.values[at] for name, at in noted.numbers.items()} == {"seed": 1, "rate": 0x3F800000}
    assert outer == [compiled_here]
    assert watched == [noted, compiled_here]
    assert not cubins.is_noting()
