"""What runs under compute-sanitizer: layouts.few; its last line counts. Without a GPU the kernels are emulated."""

import sys

import torch

from . import on_host
from .layouts import few


def main() -> int:
    """0 if all are right."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and (reason := on_host.install()):
        print(reason, file=sys.stderr)
        return 2
    passed = failed = 0
    for name, run in few(device):
        try:
            run()
            passed += 1
        except AssertionError as error:
            failed += 1
            print(f"wrong: {name}: {error}", flush=True)
    print(f"sanitized: {passed} passed, {failed} failed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
