"""The kinds of contents, one class for each: masks, an adapter that PEFT saved, or an ordinary model."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from mft.checks import nearest_path
from mft.config import CODINGS, CONFIG
from mft.config_file import load_saved
from mft.files.json_file import read_object
from mft.files.mask_coding import BY_NAME
from mft.files.safetensors_file import open_tensors
from mft.masks.export import recode_export
from mft.masks.export_format import (
    CONFIG_FILE,
    MASK_FILE,
    MOST_CONFIG,
    PEFT_TYPE,
    UNVERIFIED,
    export_files,
    is_export,
    read_description,
    read_export,
    stored_hash,
)
from mft.masks.inspection import describe_size
from mft.models.pretrained import MODEL_FILES
from mft.models.weight_files import INDEX, WEIGHTS
from mft.publishing.contents import OF_THE_HUB, Contents
from mft.publishing.facts import MERGED, Facts, add_run, facts_of_adapter, facts_of_masks, read_merged
from mft.publishing.markdown import block, text
from mft.training.run_directory import CHECKPOINTS, MODEL, result_of

_MODEL_CONFIG = "config.json"
_OF_A_MODEL = frozenset({_MODEL_CONFIG, WEIGHTS, INDEX})
_SHARD = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_AGAIN = "write it again"
_PAPER = "[Mask Fine-Tuning](https://arxiv.org/abs/2503.22764)"


def read_contents(directory: Path) -> Contents:
    """Read and check a directory or a finished run's result, as mft verify does. Raises: OSError; ValueError."""
    if not directory.is_dir():
        raise FileNotFoundError(f"directory must be one that exists, got {directory}{nearest_path(directory)}")
    if (directory / CONFIG_FILE).is_file():
        return (MaskContents if is_export(directory) else AdapterContents).read(directory)
    if (directory / _MODEL_CONFIG).is_file():
        return ModelContents.read(directory)
    result = result_of(directory)
    if result is not None:
        return read_contents(result)
    if (directory / CONFIG).is_file() or (directory / CHECKPOINTS).is_dir():
        raise ValueError(f"directory must be a finished run's, got {directory} without a result: --resume {directory}")
    raise ValueError(
        f"directory must hold masks or an adapter ({CONFIG_FILE}), a model ({_MODEL_CONFIG}) or a finished run, got "
        f"{directory} with {', '.join(sorted(path.name for path in directory.iterdir())[:3]) or 'nothing in it'}"
    )


@dataclass(frozen=True)
class MaskContents(Contents):
    """Masks. coding: how they are stored. file_bytes: the size of MASK_FILE."""

    kind = "masks"
    rivals = _OF_A_MODEL

    coding: str = CODINGS[0]
    file_bytes: int = 0

    @classmethod
    def read(cls, directory: Path) -> Self:
        export = read_export(directory)
        facts = facts_of_masks(directory, export)
        note = UNVERIFIED if facts.content_hash is None else None
        size = (directory / MASK_FILE).stat().st_size
        return cls(directory, (CONFIG_FILE, MASK_FILE), facts, note, export.coding, size)

    def introduction(self) -> str:
        return (
            f"Masks of {_PAPER}{self._base_phrase()}: a bit for each weight says whether it is kept, the others are 0. "
            "No weight was changed. They load on the very weights that they were learned on, and are refused on others."
        )

    def loading(self, repository: str) -> list[str]:
        lines = [
            "import mft",
            "",
            f"model, tokenizer = mft.load_model({self._base()})",
            f'mft.load_masks(model, "{repository}")',
            "mft.merge_model(model)  # an ordinary model: kept weights bit-equal, dropped ones 0",
        ]
        blocks = [block("python", lines), block("sh", [f"mft merge {repository} merged"])]
        return blocks if self.facts.modules_to_save else [*blocks, "Through PEFT:", self._peft_example(repository)]

    @property
    def size(self) -> str | None:
        if not self.facts.weights:
            return None
        version = BY_NAME[self.coding].version
        coded = "" if self.coding == CODINGS[0] else f"; entropy-coded, which mft of format {version} reads"
        beside = self.facts.modules_to_save
        return describe_size(self.file_bytes, self.facts.weights, beside and [text(", ".join(beside))]) + coded

    def use_coding(self, coding: str) -> tuple[Contents, dict[str, bytes]]:
        if coding == self.coding:
            return self, {}
        changed = export_files(*recode_export(self.directory, coding))
        return dataclasses.replace(self, coding=coding, file_bytes=len(changed[MASK_FILE])), changed

    def _base_name_files(self, base: str) -> dict[str, bytes]:
        export = dataclasses.replace(read_description(self.directory), base_model_name_or_path=base)
        export = dataclasses.replace(export, content_hash=stored_hash(self.directory, export), coding=self.coding)
        return {CONFIG_FILE: export.to_json().encode()}


class AdapterContents(Contents):
    """Scores, as PEFT saved them."""

    kind = "adapter"
    rivals = _OF_A_MODEL
    form = "\n# Model Card for Model ID\n"

    @classmethod
    def read(cls, directory: Path) -> Self:
        path = directory / CONFIG_FILE
        values = read_object(path, MOST_CONFIG)
        if values.get("peft_type") != PEFT_TYPE:
            raise ValueError(
                f"{path}: peft_type must be {PEFT_TYPE!r} to be pushed by mft, got {values.get('peft_type')!r}: push "
                "it with peft's push_to_hub"
            )
        weights = directory / MASK_FILE
        if not weights.is_file():
            raise FileNotFoundError(f"{weights}: missing; an adapter has {CONFIG_FILE} and {MASK_FILE}: save it again")
        with open_tensors(weights, _AGAIN) as file:
            scores = [name for name in file.keys() if ".mft_scores" in name]  # noqa: SIM118  (no mapping)
            # For experts in one parameter, (E, N, K), the parameter's name follows.
            dims = {name: 2 if name.endswith(".mft_scores") else 3 for name in scores}
            odd = [name for name in scores if len(file.get_slice(name).get_shape()) != dims[name]]
        if not scores or odd:
            raise ValueError(
                f"{weights}: expected scores (N, K) of masked layers, got {(odd or ['none'])[0]}: {_AGAIN}"
            )
        facts = dataclasses.replace(facts_of_adapter(values), modules=len(scores))
        return cls(directory, (CONFIG_FILE, MASK_FILE), facts)

    def introduction(self) -> str:
        return f"Scores of {_PAPER}{self._base_phrase()}, as PEFT saved them: from them training goes on."

    def loading(self, repository: str) -> list[str]:
        return [self._peft_example(repository)]


class ModelContents(Contents):
    """An ordinary model, merged or fine-tuned."""

    kind = "model"
    relation = "finetune"
    library = "transformers"
    rivals = frozenset({CONFIG_FILE})
    names_base = MERGED

    @classmethod
    def read(cls, directory: Path) -> Self:
        read_object(directory / _MODEL_CONFIG, MOST_CONFIG)
        for name, expected in _shards(directory).items():
            _check_shard(directory / name, expected)
        names = sorted(path.name for path in directory.iterdir() if path.is_file() and MODEL_FILES.fullmatch(path.name))
        if (directory / MERGED).is_file():
            facts = read_merged(directory / MERGED)
        elif directory.absolute().name == MODEL and (path := directory.absolute().parent / CONFIG).is_file():
            facts = add_run(Facts(base_model_name_or_path=load_saved(path).model.name), path)
        else:
            facts = Facts()
        return cls(directory, tuple(name for name in names if name not in OF_THE_HUB), facts)

    def introduction(self) -> str:
        facts, on = self.facts, self._base_phrase()
        merged, kept = f"An ordinary model: masks of {_PAPER}{on} are baked in", "so that kept weights are bit-equal"
        if facts.alpha is not None:
            return f"{merged} by `alpha` {facts.alpha:g}, {kept} and others scaled by {1 - facts.alpha:.6g}."
        if facts.kept is not None:
            return f"{merged}, {kept} and others 0."
        return f"An ordinary model, all of whose weights were fine-tuned{on}." if on else "An ordinary model."

    def loading(self, repository: str) -> list[str]:
        lines = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{repository}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{repository}")',
        ]
        return [block("python", lines)]

    @property
    def tags(self) -> list[str] | None:
        return None if self.facts.mode is None else ["mask-fine-tuning", "mft"]

    def replaces(self, name: str) -> bool:
        return _SHARD.fullmatch(name) is not None


# ---------------------------------------------------------------------------------------------- private


def _shards(directory: Path) -> dict[str, set[str]]:
    """Return {name of a weights file: the tensors that it must hold}."""
    path = directory / INDEX
    if not path.is_file():
        return {WEIGHTS: set()}
    places: Any = read_object(path, MOST_CONFIG).get("weight_map")
    names = list(places.values()) if isinstance(places, dict) else []
    plain = (isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors") for name in names)
    if not names or not all(plain):
        raise ValueError(
            f"{path}: weight_map must name a file next to it for each tensor, got {str(places)[:80]}: {_AGAIN}"
        )
    return {name: {key for key, place in places.items() if place == name} for name in sorted(set(places.values()))}


def _check_shard(path: Path, expected: set[str]) -> None:
    """Raise unless path has these tensors and no tensor of a masked layer."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing, weights of the model: {_AGAIN}")
    with open_tensors(path, _AGAIN) as file:
        stored = set(file.keys())
    missing = sorted(expected - stored)
    masked = sorted(name for name in stored if name.endswith(".scores"))
    if missing or masked or not stored:
        found = f"{masked[0]}: mft merge first" if masked else f"none called {(missing or ['anything'])[0]}: {_AGAIN}"
        raise ValueError(f"{path}: expected the weights of an ordinary model, got {found}")
