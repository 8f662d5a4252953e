"""What the ops launch where Triton is not installed, by the archives of launch_both.py.

main(FOLDER) prints, as JSON, each call's launches and the address of its result, how many cubins were loaded, what is
launched for calls that only resemble a remembered one, and a refusal. To be imported where ``import triton`` fails.
"""

import json
from pathlib import Path

import calls
import on_stub
import torch

from mft_kernels.triton import cubins, language, ops, planned
from mft_kernels.triton.target import A100, B200, H100

assert not language.INSTALLED


def address(tensor: torch.Tensor) -> str:
    """As a parameter's bytes."""
    return tensor.data_ptr().to_bytes(8, "little").hex()


def pitched(stub: on_stub.Stub) -> list[str]:
    """What rows with a pitch launch, after rows without one and where nothing is remembered."""
    m, n, k = 600, 4096, 128
    x, weight = torch.empty(m, 2 * k, dtype=calls.BF16), torch.empty(n, k, dtype=calls.BF16)
    packed, launches = torch.empty(n, k // 32, dtype=torch.int32), []
    with on_stub.taken_for(H100):
        ops.masked_linear_packed(torch.empty(m, k, dtype=calls.BF16), weight, packed, None)
        for _ in range(2):
            stub.launches()
            y = ops.masked_linear_packed(x[:, :k], weight, packed, None)
            launches.append(json.dumps(stub.launches()).replace(address(y), "y"))
            planned.forget()
    return launches


def shared(stub: on_stub.Stub) -> bool:
    """Whether x's own address is launched after a call whose x lies where the weight does."""
    n, k = 512, 1024
    weight, packed = torch.empty(n, k, dtype=calls.BF16), torch.empty(n, k // 32, dtype=torch.int32)
    with on_stub.taken_for(H100):
        ops.masked_linear_packed(weight[:1], weight, packed, None)
        stub.launches()
        x = torch.empty(1, k, dtype=calls.BF16)
        ops.masked_linear_packed(x, weight, packed, None)
    return address(x) in json.dumps(stub.launches())


def main(folder: Path) -> None:
    """Print it."""
    stub, report = on_stub.Stub(folder), {}
    for target in (A100, H100, B200):
        found = {}
        for name, call in calls.every_call().items():
            with on_stub.taken_for(target):
                call()
                first = stub.launches()
                out = call()  # by what is remembered
            found[name] = {"launches": first, "again": stub.launches(), "out": out.data_ptr()}
        report[str(target)] = found
    report["modules"] = stub.modules_loaded()
    report["pitched"], report["shared"] = pitched(stub), shared(stub)
    try:
        with on_stub.taken_for(H100):
            calls.packed_forward(3, 17, 96)()
    except cubins.NoCubin as error:
        report["refusal"] = str(error)
    print(json.dumps(report))
