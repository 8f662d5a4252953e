"""mft env: print versions, threads, the processor, and which kernels serve which device."""

from importlib.metadata import PackageNotFoundError, version
from platform import python_version

import torch
from rich.table import Table

import mft_kernels
from mft.tracking.console import console, say
from mft_kernels.internal import asked_for, path_taken, registered, this_processor


def run_env(*, measure: bool) -> None:
    """mft env"""
    console.print(f"python {python_version()}")
    console.print(f"torch {torch.__version__}")  # its metadata does not name the build, such as +cpu
    console.print(f"mft_kernels {mft_kernels.__version__}")  # the metadata may belong to another checkout
    for package in ("triton", "transformers", "datasets"):
        console.print(f"{package} {_version(package)}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    console.print(f"threads {torch.get_num_threads()}, GPU {device}")
    processor = this_processor()
    say(f"processor {processor}: {', '.join(processor.features) or 'none of the instruction sets of our kernels'}")
    path, reasons = path_taken()
    say(f"path of the cpu library {path}")
    for reason in reasons:
        say(f"  not {reason}")
    report = mft_kernels.backend_report()
    table = Table("backend", "available", "what", "why not")
    for name, entry in report["backends"].items():
        table.add_row(name, "yes" if entry["available"] else "no", entry["detail"], entry["reason"] or "")
    console.print(table)
    for kind, name in report["auto"].items():
        say(backend_line(torch.device(kind), name))
    if measure:
        from mft.cli.measure import run_measure

        run_measure(console)


def backend_line(device: torch.device, automatic: str) -> str:
    """Return which backend serves the device: the one that MFT_KERNELS asks for, or the one that "auto" takes."""
    asked = asked_for()
    if asked == "auto":
        return f"auto on {device}: {automatic} (override with MFT_KERNELS=...)"
    try:
        backend = registered(asked)
    except ValueError as error:
        return f"MFT_KERNELS={asked} on {device}: every function is refused: {error}"
    refused = {each: backend.refusal(each, device, ()) for each in registered("reference").functions}
    served = [each for each, reason in refused.items() if reason is None]
    by = f"MFT_KERNELS={asked} on {device}"
    if not served:
        return f"{by}: every function is refused: {next(iter(refused.values()))}; unset it for auto, {automatic} here"
    found = "every function" if len(served) == len(refused) else f"{', '.join(served)} alone, the others are refused"
    return f"{by}: {found} (auto: {automatic})"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
