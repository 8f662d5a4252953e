"""What mft env says: versions, threads, the processor, and which kernels serve which device."""

from importlib.metadata import PackageNotFoundError, version
from platform import python_version

from rich.table import Table

from mft.training.console import console, say


def run_env(*, measure: bool) -> None:
    """mft env"""
    import torch  # with the kernels: seconds, which installed_version need not wait for

    import mft_kernels
    from mft_kernels.cpu import path_taken
    from mft_kernels.processor import this_processor

    console.print(f"python {python_version()}")
    console.print(f"torch {torch.__version__}")  # its metadata lack the build, such as +cpu
    for package in ("mft_kernels", "triton", "transformers", "datasets"):
        console.print(f"{package} {installed_version(package)}")
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


def installed_version(package: str) -> str:
    """Of a distribution."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
