"""What the ops launch where Triton is not installed, by the archives of launch_both.py.

main(FOLDER) prints, as JSON, each call's launches and the address of its result, how many cubins were loaded, and a
refusal. To be imported where ``import triton`` fails.
"""

import json
from pathlib import Path

import calls
import on_stub

from mft_kernels.triton import cubins, language
from mft_kernels.triton.target import A100, B200, H100

assert not language.INSTALLED


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
    try:
        with on_stub.taken_for(H100):
            calls.packed_forward(3, 17, 96)()
    except cubins.NoCubin as error:
        report["refusal"] = str(error)
    print(json.dumps(report))
