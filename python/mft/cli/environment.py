"""What mft env says: versions, threads, the processor, and which kernels serve which device."""

from importlib.metadata import PackageNotFoundError, version
from platform import python_version

import torch
from rich.table import Table

import mft_kernels
from mft.tracking.console import console, say
from mft_kernels.cpu import path_taken
from mft_kernels.processor import this_processor


def run_env(*, measure: bool) -> None:
    """mft env"""
    console.print(f"python {python_version()}")
    console.print(f"torch {torch.__version__}")  # its metadata lack the build, such as +cpu
    console.print(f"mft_kernels {mft_kernels.__version__}")  # metadata may be of another checkout
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
        console.print(f"auto on {kind}: {name} (override with MFT_KERNELS=...)")
    if measure:
        from mft.cli.measure import run_measure

        run_measure(console)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
