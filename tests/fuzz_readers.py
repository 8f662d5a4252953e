"""Fuzz the readers of untrusted files, guided by coverage: python tests/fuzz_readers.py READER SECONDS

atheris (libFuzzer) keeps each input that reaches a new line of mft's readers, and mutates it further. It begins with a
good file, and with some files that it would hardly find by mutation. It keeps inputs in build/fuzz/READER for the next
run. An input fails if it is neither read nor refused by one error that names the file, or if it takes 10 seconds or
3 GB. A failure ends the run with exit code 77, 70 or 71, and the input is saved there as crash-*, timeout-* or oom-*.
"""

import io
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import atheris
import numpy as np
import torch
from torch._weights_only_unpickler import Unpickler

Unpickler.load = atheris.instrument_func(Unpickler.load)  # also instrument torch's loader of the paper's file
with atheris.instrument_imports(include=["mft"]):
    from tiny import make_llama, masked_llama
    from tiny_gguf import write_tiny_gguf

    from mft.config import RunConfig
    from mft.config_file import load_config, save_config
    from mft.files.gguf_file import read_gguf_header
    from mft.masks.export import save_masks
    from mft.masks.export_format import CONFIG_FILE, MASK_FILE, read_export, read_tensors
    from mft.masks.paper_masks import read_paper_masks, write_paper_masks
    from mft.memory.model_config import read_model_config
    from mft.patching.undo_file import Facts, Undo, read_undo
    from mft.training.checkpoint import Checkpoint, verify_checkpoint, write_checkpoint

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 8192  # the most bytes of an input


@dataclass(frozen=True)
class Reader:
    """How to make a good directory, which of its files to mutate, and what reads the directory."""

    make: Callable[[Path], object]
    file: str
    read: Callable[[Path], object]
    more: Callable[[], list[bytes]] = list  # other contents of the file to begin with


def main() -> None:
    """Run the fuzzer; libFuzzer ends the process."""
    if len(sys.argv) != 3 or sys.argv[1] not in READERS:
        sys.exit(f"READER SECONDS must follow, READER one of {', '.join(READERS)}; got {' '.join(sys.argv[1:])}")
    name, seconds = sys.argv[1], int(sys.argv[2])
    reader = READERS[name]
    warnings.simplefilter("ignore")  # torch warns of each pickle's protocol
    corpus = ROOT / "build" / "fuzz" / name
    corpus.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    reader.make(directory)
    path = directory / reader.file
    shutil.copy(path, corpus / "good")
    for number, content in enumerate(reader.more()):
        (corpus / f"more-{number}").write_bytes(content)
    reader.read(directory)

    def try_input(content: bytes) -> None:
        path.write_bytes(content)
        try:
            reader.read(directory)
        except ValueError as error:
            if str(directory) not in str(error):
                raise AssertionError(f"the error must name the file, got {error}") from error

    longest = max(LONGEST, path.stat().st_size + 1024)
    limits = [f"-max_total_time={seconds}", f"-max_len={longest}", "-timeout=10", "-rss_limit_mb=3000"]
    options = [f"-artifact_prefix={corpus}/", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], str(corpus), *limits, *options], try_input)
    atheris.Fuzz()


def _make_export(directory: Path) -> None:
    save_masks(masked_llama(layers=(3,), target_modules=["q_proj"]), directory / "masks", coding="packed")


def _make_coded_export(directory: Path) -> None:
    save_masks(masked_llama(layers=(3,), target_modules=["q_proj"]), directory / "masks", coding="rice")


def _make_export_by_weight(directory: Path) -> None:
    save_masks(masked_llama(layers=(3,), target_modules=["q_proj"]), directory / "masks", coding="by_weight")


def _make_paper_masks(directory: Path) -> None:
    write_paper_masks(masked_llama(layers=(3,), target_modules=["q_proj"]), directory / "masks.pt")


def _odd_masks() -> list[bytes]:
    """Return pickles with tensors that are not dense matrices stored in the file."""
    made = [
        torch.empty(9, 9, device="meta"),
        torch.ones(1).expand(1 << 16, 1 << 16),
        torch.ones(4, 4).to_sparse(),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        torch.nn.Parameter(torch.ones(4, 4)),
        torch.ones(4, 6).t(),
    ]
    files = []
    for mask in made:
        buffer = io.BytesIO()
        torch.save({"up_proj": mask}, buffer)
        files.append(buffer.getvalue())
    return files


def _aliases() -> list[bytes]:
    lines = [f"- &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    return ["\n".join(["output_dir:", "- &a0 [1, 1]", *lines]).encode(), b"mask: {layers_to_transform: 0-9}"]


def _make_checkpoint(directory: Path) -> None:
    write_checkpoint(directory, 3, {"scores": torch.arange(40.0).view(5, 8)}, {"numbers": [1, 2]})


def _make_config(directory: Path) -> None:
    save_config(RunConfig(), directory / "config.yaml")


def _read_checkpoint(directory: Path) -> None:
    found = verify_checkpoint(directory / "step-00000003")
    found.facts()
    found.tensors()


def _checkpoint(directory: Path) -> Checkpoint:
    return Checkpoint(directory / "step-00000003", 3)


def _read_export(directory: Path) -> None:
    read_export(directory / "masks")


def _read_export_by_weight(directory: Path) -> None:
    export = read_export(directory / "masks")
    read_tensors(directory / "masks", export, lambda name: make_llama().get_parameter(f"{name}.weight"))


def _make_undo(directory: Path) -> None:
    places = np.array([3, 4, 700])
    facts = Facts("0" * 64, "1" * 64, 1000, "sha256:x", 3)
    undo = Undo(
        facts, np.array([[0, 0, 990], [1, 0, 10]]), np.arange(10, dtype=np.uint8), places, places.astype(np.uint8)
    )
    (directory / "model.gguf.undo").write_bytes(undo.to_bytes())


READERS = {
    "export-config": Reader(_make_export, f"masks/{CONFIG_FILE}", _read_export),
    "export-masks": Reader(_make_export, f"masks/{MASK_FILE}", _read_export),
    "coded-masks": Reader(_make_coded_export, f"masks/{MASK_FILE}", _read_export),
    "masks-by-weight": Reader(_make_export_by_weight, f"masks/{MASK_FILE}", _read_export_by_weight),
    "checkpoint": Reader(_make_checkpoint, "step-00000003/manifest.json", _read_checkpoint),
    "checkpoint-facts": Reader(_make_checkpoint, "step-00000003/state.json", lambda root: _checkpoint(root).facts()),
    "checkpoint-tensors": Reader(
        _make_checkpoint, "step-00000003/state.safetensors", lambda root: _checkpoint(root).tensors()
    ),
    "config": Reader(_make_config, "config.yaml", lambda root: load_config(root / "config.yaml"), _aliases),
    "paper-masks": Reader(_make_paper_masks, "masks.pt", lambda root: read_paper_masks(root / "masks.pt"), _odd_masks),
    "gguf": Reader(
        lambda root: write_tiny_gguf(root / "model.gguf"),
        "model.gguf",
        lambda root: read_gguf_header(root / "model.gguf"),
    ),
    "undo": Reader(_make_undo, "model.gguf.undo", lambda root: read_undo(root / "model.gguf")),
    "model-config": Reader(
        lambda root: make_llama().config.save_pretrained(root),
        "config.json",
        lambda root: read_model_config(str(root / "config.json")),
    ),
}


if __name__ == "__main__":
    main()
