"""Write masks into a GGUF file: dropped weights become exact zeros in their own codes, and every other bit stays."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType

from mft.files.atomic import atomic_file, convert_disk_errors, sweep, write_whole
from mft.patching.block_codes import CODES, code_of
from mft.patching.locks import check_new, claim, lock_for_changing, lock_for_reading
from mft.patching.patch_plan import LoadBase, Plan, plan_patch
from mft.patching.rewrite import Rewrite
from mft.patching.undo_file import read_undo, undo_path

_WINDOW = 1 << 20  # bytes that are rewritten in place at a time


@dataclass(frozen=True)
class Patched:
    """The result of a patch."""

    path: Path
    undo: Path  # undo_gguf_patch needs it to restore the original
    dropped: int  # weights
    changed: int  # bytes of codes; dropped weights that were 0 before change none
    grown: int  # bytes by which the file is longer than the original
    base: str  # a sentence that says whether the file was the masks' base
    widened: int = 0  # dropped weights in tensors that became float32


def patch_gguf(
    model: str | os.PathLike,
    masks: str | os.PathLike,
    output: str | os.PathLike,
    *,
    widen: str | None = None,
    load_base: LoadBase | None = None,
    force: bool = False,
) -> Patched:
    """Write a GGUF file in which the weights that masks drop are exact zeros; every other weight keeps its bits.

    ``decode(output) == where(mask, decode(model), 0)``, element by element. output is written whole or not at all.
    Next to it, output.undo is written, from which undo_gguf_patch restores the original.

    Args:
        model: a GGUF file, in which each masked layer has tensors of its own, of the types F32, F16, BF16, Q8_0, Q4_0,
            Q5_0, Q6_K, Q3_K, TQ1_0, TQ2_0 or MXFP4. Other types have no exact zero.
        masks: as for load_masks.
        output: a new file.
        widen: "f32" stores the masked tensors of other types in float32, which makes the file longer.
        load_base: returns the model that the masks were learned on. It is called if the file's weights are not
            bit-equal to that model's; then shapes and correlation are checked.
        force: accept other weights of the same shapes, unchecked.
    Raises: FileNotFoundError; ValueError if model or masks are damaged, do not fit each other, or a type has no zero;
        RuntimeError if another patch works on one of the files; OSError if output cannot be written. In each case,
        nothing is left behind.
    """
    path, target = Path(model), Path(output)
    check_new(target)
    with lock_for_reading(path):
        plan = plan_patch(path, masks, load_base=load_base, force=force)
        widened = _find_widened(plan, widen)
        beside = undo_path(target)
        with convert_disk_errors(beside), claim(beside) as undo:
            check_new(target)
            sweep(target.parent, lambda name: name == target.name)
            try:
                with atomic_file(target) as scratch:
                    with scratch.open("wb") as sink:
                        rewrite = Rewrite(plan, sink, widened).run()
                    undo.write(rewrite.undo().to_bytes())
                    undo.flush()
                    os.fsync(undo.fileno())  # before the patched file appears
            except BaseException:
                target.unlink(missing_ok=True)  # it may be there if only its directory could not be synced
                raise
    grown = rewrite.bytes_after - rewrite.bytes_before
    in_widened = sum(len(plan.dropped[name]) for name in widened)
    return Patched(target, beside, plan.count, len(rewrite.places), grown, plan.base, in_widened)


def patch_gguf_in_place(
    model: str | os.PathLike, masks: str | os.PathLike, *, load_base: LoadBase | None = None, force: bool = False
) -> Patched:
    """Patch the file itself, like patch_gguf. A running llama.cpp maps the file and uses the new codes at once.

    model.undo is written first. From it, undo_gguf_patch_in_place restores the original, also after an interrupted
    patch.
    """
    path, beside = Path(model), undo_path(model)
    with lock_for_changing(path):
        if os.path.lexists(beside):
            raise ValueError(
                f"{path} must not have been patched before, got {beside.name} next to it: undo that patch first "
                "(--undo --in-place)"
            )
        plan = plan_patch(path, masks, load_base=load_base, force=force)
        _find_widened(plan, None)
        rewrite = Rewrite(plan, None).run()
        write_whole(beside, rewrite.undo().to_bytes())
        _overwrite(path, rewrite.places, rewrite.new)
    return Patched(path, beside, plan.count, len(rewrite.places), 0, plan.base)


def undo_gguf_patch(patched: str | os.PathLike, output: str | os.PathLike) -> Path:
    """Write the original of a patched file to output, byte for byte.

    Args: patched: what patch_gguf wrote, with its undo file next to it; output: a new file.
    Returns: output.
    Raises: FileNotFoundError; ValueError if either file has been changed since; OSError. output is then not written.
    """
    path, target = Path(patched), Path(output)
    check_new(target)
    with lock_for_reading(path):
        undo = read_undo(path)
        with atomic_file(target) as scratch, scratch.open("wb") as sink:
            undo.restore(path, sink)
    return target


def undo_gguf_patch_in_place(patched: str | os.PathLike) -> Path:
    """Restore the original in the file itself, then delete its undo file. Raises: as undo_gguf_patch."""
    path = Path(patched)
    with lock_for_changing(path):
        undo = read_undo(path)
        if not undo.is_in_order:
            raise ValueError(
                f"{path} must hold its tensors at the same places as the original to be restored in place, got a "
                "widened file: name a new file for the original"
            )
        undo.restore(path)  # without a sink: this only checks the hash
        _overwrite(path, undo.places, undo.old)
        undo_path(path).unlink()
    return path


# ---------------------------------------------------------------------------------------------- private


def _find_widened(plan: Plan, widen: str | None) -> frozenset[str]:
    """Return the names of masked tensors whose type has no zero. Raises: ValueError if they exist and widen is None."""
    if widen not in (None, "f32"):
        raise ValueError(f"widen must be f32 (or not be given), got {widen!r}")
    names = [name for name in plan.dropped if code_of(plan.tensor(name).kind) is None]
    if names and widen is None:
        kind = GGMLQuantizationType(plan.tensor(names[0]).kind).name
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ValueError(
            f"{plan.path}: masked tensors must be of a type with an exact zero ({', '.join(CODES)}), got {kind} of "
            f"{names[0]}{others}: --widen f32 stores them in float32, or quantise the model to Q8_0 or Q4_0"
        )
    return frozenset(names)


def _overwrite(path: Path, places: np.ndarray, new: np.ndarray) -> None:
    """Overwrite the bytes of a file at these ascending places with new."""
    with convert_disk_errors(path), path.open("r+b") as file:
        for start in range(0, os.fstat(file.fileno()).st_size, _WINDOW):
            first, last = np.searchsorted(places, [start, start + _WINDOW])
            if first < last:
                window = np.fromfile(path, np.uint8, _WINDOW, offset=start)
                window[places[first:last] - start] = new[first:last]
                file.seek(start)
                file.write(window.data)
        file.flush()
        os.fsync(file.fileno())
