"""What is known of what is published: of the masks, and of the run that made them; None where nothing says it."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from mft.checks import Rule, coerce_fields
from mft.config import RunConfig
from mft.config_file import load_config
from mft.evaluation.evaluated_base import config_of_run
from mft.files.json_file import read_object
from mft.masks.export_format import MaskExport
from mft.training.run_directory import TABLE_JSON

MERGED = "mft_merge.json"  # beside a merged model's weights: what mft merge knew of its masks
_ALPHA = Rule("lie in (0, 1]", exclusiveMinimum=0, maximum=1)
_MOST = 1 << 24  # bytes of a file of facts


@dataclass(frozen=True)
class Results:
    """The evaluations of a run by name, in nats a token and as shares; loss after - before, and its standard error."""

    evaluations: dict[str, dict[str, float]]
    difference: float
    error: float


@dataclass
class Facts:
    """Fields as in MaskExport; modules, kept and weights are counts of layers and of their weights.

    alpha: of merge_model; None: 1.
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
    """Of an export, and of its run where that lies beside it. Raises: ValueError that names a file of the run."""
    facts, path = facts_of_export(export), config_of_run(directory)
    return facts if path is None else with_run(facts, path)


def with_run(facts: Facts, config: Path) -> Facts:
    """With the configuration and the results of the run whose CONFIG this is. Raises: as facts_of_masks."""
    table = config.with_name(TABLE_JSON)
    results = read_results(table) if table.is_file() else None
    return dataclasses.replace(facts, config=load_config(config), results=results)


def facts_of_adapter(values: dict[str, Any]) -> Facts:
    """Of the adapter_config.json that PEFT wrote, whose layers are a choice and not yet a list of modules."""
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
    """What MERGED holds: all but the run's configuration, and alpha where it is 1, as before there was one."""
    values = dataclasses.asdict(facts)
    return {key: value for key, value in values.items() if key != "config" and (key, value) != ("alpha", None)}


def read_merged(path: Path) -> Facts:
    """Raises: ValueError that names the file, if it is not what merged_facts gave."""
    values = read_object(path, _MOST)
    known = {field.name for field in dataclasses.fields(Facts)} - {"config"}
    if values.keys() | {"alpha"} != known:
        odd = sorted((values.keys() | {"alpha"}) ^ known)
        raise ValueError(f"{path}: expected the keys that mft merge writes, {odd[0]!r} is one too many or few")
    results = values.pop("results")
    try:
        facts = Facts(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return facts if results is None else dataclasses.replace(facts, results=_results(results, path))


def read_results(path: Path) -> Results:
    """Of the table.json of a run: its evaluations, and what the loss has gained.

    Raises: ValueError that names the file.
    """
    values = read_object(path, _MOST)
    rows = {name: row for name, row in values.items() if isinstance(row, dict) and {"loss", "accuracy"} <= row.keys()}
    named = {"difference": values.get("loss after - before"), "error": values.get("standard error")}
    return _results({"evaluations": rows, **named}, path)


def _results(values: Any, path: Path) -> Results:
    known = {field.name for field in dataclasses.fields(Results)}
    whole = isinstance(values, dict) and values.keys() == known and isinstance(values["evaluations"], dict)
    rows = list(values["evaluations"].values()) if whole else [None]
    numbers = [row.get(key) if isinstance(row, dict) else None for row in rows for key in ("loss", "accuracy")]
    for number in (*numbers, *((values["difference"], values["error"]) if whole else ())):
        if not isinstance(number, int | float) or not math.isfinite(number):
            raise ValueError(
                f"{path}: expected finite losses and accuracies, as a finished run writes them, got {number}"
            )
    return Results(**values)
