"""What a directory has to publish, found whole: masks, an adapter that PEFT saved, or an ordinary model."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mft.checks import nearest_path
from mft.config import CONFIG
from mft.config_file import load_config
from mft.evaluation.evaluated_base import config_of_run
from mft.files.json_file import read_object
from mft.files.safetensors_file import open_tensors
from mft.masks.export_format import (
    CONFIG_FILE,
    MASK_FILE,
    MOST_CONFIG,
    PEFT_TYPE,
    UNVERIFIED,
    MaskExport,
    is_export,
    read_whole_export,
)
from mft.models.pretrained import MODEL_FILES
from mft.publishing.facts import MERGED, Facts, facts_of_adapter, facts_of_export, read_merged, read_results
from mft.training.run_directory import CHECKPOINTS, MODEL, TABLE_JSON, result_of

README = "README.md"
MODEL_CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_OF_THE_HUB = (README, ".gitattributes")  # the card has its own rules, and the hub writes the other
_AGAIN = "write it again"


@dataclass(frozen=True)
class Contents:
    """kind: masks, adapter or model. files: what is uploaded, by name; left_out: what is not. note: a warning.

    coding, size: of masks how they are stored, and the bytes of MASK_FILE.
    """

    kind: str
    directory: Path
    files: tuple[str, ...]
    facts: Facts
    left_out: tuple[str, ...] = ()
    note: str | None = None
    coding: str | None = None
    size: int | None = None


def read_contents(directory: Path) -> Contents:
    """What directory, or a finished run's, holds; every file has been checked as mft verify would.

    Raises: FileNotFoundError if there is no such directory; ValueError that names the file and says what is missing or
        damaged, or that the run has no result yet.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"directory must be one that exists, got {directory}{nearest_path(directory)}")
    if (directory / CONFIG_FILE).is_file():
        return _masks(directory) if is_export(directory) else _adapter(directory)
    if (directory / MODEL_CONFIG).is_file():
        return _model(directory)
    result = result_of(directory)
    if result is not None:
        return read_contents(result)
    if (directory / CONFIG).is_file() or (directory / CHECKPOINTS).is_dir():
        raise ValueError(f"directory must be a finished run's, got {directory} without a result: --resume {directory}")
    raise ValueError(
        f"directory must hold masks or an adapter ({CONFIG_FILE}), a model ({MODEL_CONFIG}) or a finished run, got "
        f"{directory} with {', '.join(sorted(path.name for path in directory.iterdir())[:3]) or 'nothing in it'}"
    )


def facts_of_masks(directory: Path, export: MaskExport) -> Facts:
    """Of an export, and of its run where that lies beside it. Raises: ValueError that names a file of the run."""
    facts, path = facts_of_export(export), config_of_run(directory)
    return facts if path is None else _with_run(facts, path)


def _masks(directory: Path) -> Contents:
    export = read_whole_export(directory)[0]
    facts = facts_of_masks(directory, export)
    files = (CONFIG_FILE, MASK_FILE)
    note = UNVERIFIED if facts.content_hash is None else None
    size = (directory / MASK_FILE).stat().st_size
    return Contents("masks", directory, files, facts, _others(directory, files), note, export.coding, size)


def _adapter(directory: Path) -> Contents:
    path = directory / CONFIG_FILE
    values = read_object(path, MOST_CONFIG)
    if values.get("peft_type") != PEFT_TYPE:
        raise ValueError(
            f"{path}: peft_type must be {PEFT_TYPE!r} to be pushed by mft, got {values.get('peft_type')!r}: push it "
            "with peft's push_to_hub"
        )
    weights = directory / MASK_FILE
    if not weights.is_file():
        raise FileNotFoundError(f"{weights}: missing; an adapter has {CONFIG_FILE} and {MASK_FILE}: save it again")
    with open_tensors(weights, _AGAIN) as file:
        scores = [name for name in file.keys() if ".mft_scores" in name]  # noqa: SIM118  (no mapping)
        # Of experts in one parameter, (E, N, K), that one's name follows.
        dims = {name: 2 if name.endswith(".mft_scores") else 3 for name in scores}
        odd = [name for name in scores if len(file.get_slice(name).get_shape()) != dims[name]]
    if not scores or odd:
        raise ValueError(f"{weights}: expected scores (N, K) of masked layers, got {(odd or ['none'])[0]}: {_AGAIN}")
    files = (CONFIG_FILE, MASK_FILE)
    facts = dataclasses.replace(facts_of_adapter(values), modules=len(scores))
    return Contents("adapter", directory, files, facts, _others(directory, files))


def _model(directory: Path) -> Contents:
    read_object(directory / MODEL_CONFIG, MOST_CONFIG)
    for name, expected in _shards(directory).items():
        path = directory / name
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing, weights of the model: {_AGAIN}")
        with open_tensors(path, _AGAIN) as file:
            stored = set(file.keys())
        missing = sorted(expected - stored)
        masked = sorted(name for name in stored if name.endswith(".scores"))
        if missing or masked or not stored:
            found = (
                f"{masked[0]}: mft merge first" if masked else f"none called {(missing or ['anything'])[0]}: {_AGAIN}"
            )
            raise ValueError(f"{path}: expected the weights of an ordinary model, got {found}")
    names = sorted(path.name for path in directory.iterdir() if path.is_file() and MODEL_FILES.fullmatch(path.name))
    files = tuple(name for name in names if name not in _OF_THE_HUB)
    if (directory / MERGED).is_file():
        facts = read_merged(directory / MERGED)
    elif directory.absolute().name == MODEL and (path := directory.absolute().parent / CONFIG).is_file():
        facts = _with_run(Facts(base_model_name_or_path=load_config(path).model.name), path)
    else:
        facts = Facts()
    return Contents("model", directory, files, facts, _others(directory, files))


def _shards(directory: Path) -> dict[str, set[str]]:
    """The files of weights, and the tensors that each has to hold."""
    path = directory / INDEX
    if not path.is_file():
        return {WEIGHTS: set()}
    places: Any = read_object(path, MOST_CONFIG).get("weight_map")
    if not isinstance(places, dict) or not places or not all(_is_plain(name) for name in places.values()):
        raise ValueError(
            f"{path}: weight_map must name a file beside it for each tensor, got {str(places)[:80]}: {_AGAIN}"
        )
    return {name: {key for key, place in places.items() if place == name} for name in sorted(set(places.values()))}


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")


def _others(directory: Path, files: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted({path.name for path in directory.iterdir()} - {*files, *_OF_THE_HUB}))


def _with_run(facts: Facts, config: Path) -> Facts:
    table = config.with_name(TABLE_JSON)
    results = read_results(table) if table.is_file() else None
    return dataclasses.replace(facts, config=load_config(config), results=results)
