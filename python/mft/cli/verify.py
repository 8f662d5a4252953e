"""mft verify: check that masks and checkpoints in a directory are undamaged, and that the masks fit the base."""

import math
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from mft.files.mask_coding import BY_NAME
from mft.masks.export import base_hash, read_learned
from mft.masks.export_format import CONFIG_FILE, MASK_FILE, UNVERIFIED, MaskExport, read_export
from mft.masks.inspection import describe_size
from mft.masks.location import MASKS, local_directory
from mft.tracking.console import say
from mft.training.checkpoint import FACTS, MANIFEST, verify_checkpoint
from mft.training.inputs import read_base
from mft.training.run_directory import CHECKPOINTS


def run_verify(directory: str, model_name: str | None, dtype: str | None, *, base: bool) -> None:
    """mft verify"""
    for found in verify_directory(local_directory(directory)):
        say(f"{found.kind} {found.path}: {found.words}")
        if found.export is not None and base:
            model, _ = read_base(found.path, model_name, dtype)
            check_base(model, found)
            whole = ", and the masks that it reads have their content hash" if _takes_weights(found.export) else ""
            say(f"base: {found.export.base_hash} agrees{whole}")


@dataclass(frozen=True)
class Verified:
    """An export of masks or a checkpoint that was found undamaged."""

    path: Path
    kind: str  # masks or checkpoint
    words: str
    export: MaskExport | None = None


def verify_directory(directory: Path) -> list[Verified]:
    """Verify every export and checkpoint in a directory: an export, a checkpoint, or the directory of a run.

    Raises: FileNotFoundError if there is none; ValueError that names the first damaged file.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: expected a directory with masks or checkpoints, got nothing there")
    exports = [path for path in (directory, directory / MASKS) if (path / CONFIG_FILE).is_file()]
    places = (directory, *sorted(directory.glob(f"{CHECKPOINTS}/step-*")))
    checkpoints = [path for path in places if (path / MANIFEST).is_file() or (path / FACTS).is_file()]
    if not exports and not checkpoints:
        raise FileNotFoundError(
            f"{directory}: expected {CONFIG_FILE} or {MANIFEST}, here, in {MASKS}/ or in {CHECKPOINTS}/, got neither"
        )
    return [_verified_export(path) for path in exports] + [_verified_checkpoint(path) for path in checkpoints]


def check_base(model: nn.Module, found: Verified) -> None:
    """Raise ValueError unless model has the weights that the masks were learned on.

    Masks whose coding needs these weights are also read, which checks their content hash.
    """
    assert found.export is not None
    expected, got = found.export.base_hash, base_hash(model, [entry.name for entry in found.export.modules])
    if got != expected:
        raise ValueError(f"{found.path}: expected a base with {expected}, the model's is {got}: it is another base")
    if _takes_weights(found.export):
        read_learned(model, found.export, found.path, force=False)


def _takes_weights(export: MaskExport) -> bool:
    return BY_NAME[export.coding].needs_weight


def _verified_export(path: Path) -> Verified:
    export = read_export(path)
    weights = sum(math.prod(entry.shape) for entry in export.modules)
    kept = sum(entry.kept for entry in export.modules)
    hashed = "content hash agrees" if export.content_hash else UNVERIFIED
    if _takes_weights(export):
        hashed = "masks are not checked without the base"
    layers = f"{len(export.modules)} masked layers, {100 * kept / weights:.2f} % of {weights} weights kept"
    size = describe_size((path / MASK_FILE).stat().st_size, weights, export.modules_to_save)
    return Verified(path, "masks", f"{layers}; {export.coding}, {size}; {hashed}", export)


def _verified_checkpoint(path: Path) -> Verified:
    found = verify_checkpoint(path)
    return Verified(path, "checkpoint", f"after step {found.step}; sizes and hashes agree")
