"""Facts about what is published: about the masks and about the run that made them. A fact is None if it is unknown."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from mft.checks import Rule, coerce_fields
from mft.config import RunConfig
from mft.config_file import load_saved
from mft.evaluation.evaluated_base import config_of_run
from mft.files.json_file import read_object
from mft.masks.export_format import MaskExport
from mft.training.run_directory import TABLE_JSON

MERGED = "mft_merge.json"  # next to a merged model's weights: what mft merge knew about its masks
_ALPHA = Rule("lie in (0, 1]", exclusiveMinimum=0, maximum=1)
_MOST = 1 << 24  # most bytes of a file of facts


@dataclass(frozen=True)
class Results:
    """The evaluations of a run by name (nats per token, accuracy as a share), and what its loss has gained.

    difference: loss after - before. error: its standard error, None if it is of one document.
    """

    evaluations: dict[str, dict[str, float]]
    difference: float
    error: float | None


@dataclass
class Facts:
    """Facts about masks. Fields are as in MaskExport, except for counts.

    modules: the number of masked layers. weights, kept: the numbers of their weights and of their kept weights.
    alpha: as for merge_model; None means 1.
    """

    base_model_name_or_path: str | None = None
    base_hash: str | None = None
    content_hash: str | None = None
    dtype: str | None = None
    mode: str | None = None
    keep_ratio: float | None = None
    target_modules: list[str] | None = None
    layers_to_transform: list[int] | None = None
    modules: int | None = None
    kept: int | None = None
    weights: int | None = None
    base_quantization: str | None = None
    modules_to_save: list[str] | None = None
    alpha: Annotated[float | None, _ALPHA] = None
    config: RunConfig | None = None
    results: Results | None = None

    def __post_init__(self) -> None:
        coerce_fields(self)


def facts_of_export(export: MaskExport) -> Facts:
    same = {field.name for field in dataclasses.fields(Facts)} & {field.name for field in dataclasses.fields(export)}
    return Facts(
        **{name: getattr(export, name) for name in same - {"modules"}},
        dtype=export.modules[0].dtype,
        modules=len(export.modules),
        kept=sum(entry.kept for entry in export.modules),
        weights=sum(math.prod(entry.shape) for entry in export.modules),
    )


def facts_of_masks(directory: Path, export: MaskExport) -> Facts:
    """Return the facts of an export and of its run, if any. Raises: ValueError that names a file of the run."""
    facts, path = facts_of_export(export), config_of_run(directory)
    return facts if path is None else add_run(facts, path)


def add_run(facts: Facts, config: Path) -> Facts:
    """Return the facts with a run's configuration (its CONFIG file) and results. Raises: as facts_of_masks."""
    table, results = config.with_name(TABLE_JSON), None
    if table.is_file():
        values = read_object(table, _MOST)
        numbers = {"difference": values.get("loss after - before"), "error": values.get("standard error")}
        rows = {k: row for k, row in values.items() if isinstance(row, dict) and {"loss", "accuracy"} <= row.keys()}
        results = _results({"evaluations": rows, **numbers}, table)
    return dataclasses.replace(facts, config=load_saved(config), results=results)


def facts_of_adapter(values: dict[str, Any]) -> Facts:
    """Return the facts in PEFT's adapter_config.json. It says how to choose layers, but does not list the modules."""
    kinds: dict[str, Any] = {
        "base_model_name_or_path": str,
        "mode": str,
        "keep_ratio": int | float,
        "layers_to_transform": list,
        "target_modules": list,
        "modules_to_save": list,
    }
    return Facts(**{name: values[name] for name, kind in kinds.items() if isinstance(values.get(name), kind)})


def merged_facts(facts: Facts) -> dict[str, Any]:
    """Return what MERGED holds: all facts except the run's configuration, and alpha only if it is not 1."""
    values = dataclasses.asdict(facts)
    return {key: value for key, value in values.items() if key != "config" and (key, value) != ("alpha", None)}


def read_merged(path: Path) -> Facts:
    """Read the facts that merged_facts returned. Raises: ValueError that names the file, if it holds anything else."""
    values = read_object(path, _MOST)
    known = {field.name for field in dataclasses.fields(Facts)} - {"config"}
    if values.keys() | {"alpha"} != known:
        odd = sorted((values.keys() | {"alpha"}) ^ known)
        raise ValueError(
            f"{path}: expected exactly the keys that mft merge writes, got {odd[0]!r} in excess or missing"
        )
    results = values.pop("results")
    try:
        facts = Facts(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return facts if results is None else dataclasses.replace(facts, results=_results(results, path))


def _results(values: Any, path: Path) -> Results:
    known = {field.name for field in dataclasses.fields(Results)}
    whole = isinstance(values, dict) and values.keys() == known and isinstance(values["evaluations"], dict)
    rows = list(values["evaluations"].values()) if whole else [None]
    numbers = [row.get(key) if isinstance(row, dict) else None for row in rows for key in ("loss", "accuracy")]
    if whole:
        numbers += [values["difference"], *([] if values["error"] is None else [values["error"]])]
    for number in numbers:
        if not isinstance(number, int | float) or not math.isfinite(number):
            raise ValueError(
                f"{path}: expected finite losses and accuracies, as a finished run writes them, got {number}"
            )
    return Results(**values)
