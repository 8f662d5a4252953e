"""Find the base that a command runs on (by default that of the masks), exact or quantised, and describe it."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

from mft.config import CONFIG, ModelConfig, RunConfig
from mft.config_file import load_saved
from mft.data.sources import NAMED
from mft.escaping import one_line
from mft.masks.export_format import MaskExport, read_description
from mft.masks.location import MASKS
from mft.models.pretrained import SHORTHANDS


def learned_base(masks: Path, name: str | None = None, dtype: str | None = None) -> tuple[ModelConfig, str]:
    """Return the base on which exported masks were learned, and a line that says where this was found.

    The run's configuration comes before the masks; name and dtype override both.
    Raises: ValueError if none names a base, or as read_description.
    """
    path, known = _known_base(masks)
    model = load_saved(path, known).model
    if name is None and not known:
        raise ValueError(f"--model must name the base, {masks} does not")
    if name is not None:
        model = dataclasses.replace(model, name=name, revision=None)  # the revision belonged to the other model
    if dtype is not None:
        model = dataclasses.replace(model, dtype=dtype)
    return model, f"{_source(path, masks)}: base {_name(model)} in {model.dtype}"


def config_of_run(masks: Path) -> Path | None:
    """Return the configuration file of the run that wrote the masks, if it is next to them and has the same base."""
    masks = masks if masks.name else masks.absolute()
    path = masks.parent / CONFIG
    if masks.name != MASKS or not path.is_file():
        return None
    named = read_description(masks).base_model_name_or_path
    return path if named in (None, load_saved(path).model.name) else None


def evaluated_config(masks: Path, overrides: Sequence[str]) -> tuple[RunConfig, str]:
    """Return the base and data on which masks are evaluated, and where they were found. overrides take precedence."""
    path, known = _known_base(masks)
    config = load_saved(path, [*known, *overrides])
    model = config.model
    sources = config.data.sources
    named = config.data.source if sources is None else " and ".join(given.source for given in sources.values())
    data = f"; data: {named}" if path is None else f", data {named}"  # masks do not name their data
    return config, f"{_source(path, masks)}: base {_name(model)} in {model.dtype}{data}"


def check_exact(model: ModelConfig, verb: str) -> None:
    """Raise ValueError if the configuration quantises the base for a command (``verb``) that trains weights."""
    if model.quantization is not None:
        raise ValueError(
            f"model.quantization must be null for mft {verb}, which trains weights, got {model.quantization}"
        )


def evaluated_base(model: ModelConfig, export: MaskExport | None, unquantized: bool) -> tuple[str | None, bool]:
    """Return the base's quantisation, and whether masked layers have it. Raises: ValueError if model names another."""
    if unquantized:
        return None, False
    asked = (model.quantization, model.quantize_masked)
    if export is None:
        return asked
    learned = (export.base_quantization, export.quantize_masked)
    if model.quantization is not None and asked != learned:
        raise ValueError(
            f"model.quantization must be that of the base on which the masks were learned, {_words(*learned)}, got "
            f"{_words(*asked)}: leave it out, or pass --unquantized for the exact base"
        )
    return learned


def base_words(kind: str | None, quantize_masked: bool, export: MaskExport | None) -> str:
    """Return a line that says which base was evaluated, and on which one the masks were learned."""
    if export is None:
        return f"base: {_words(kind, True)}"
    base = f"base: {_words(kind, quantize_masked)}"
    learned = (export.base_quantization, export.quantize_masked)
    if learned == (kind, quantize_masked):
        return f"{base}, as the masks were learned"
    return f"{base}; the masks were learned on {_words(*learned)}"


def _known_base(masks: Path) -> tuple[Path | None, list[str]]:
    """Return the run's configuration file or None, and overrides: its paths as seen from here, or the masks' base."""
    path = config_of_run(masks)
    if path is not None:
        config = load_saved(path)
        places = {
            "model.name": config.model.name,
            "model.chat_template": config.model.chat_template,
            "data.source": config.data.source,
            "objective.teacher": config.objective.teacher,
            **{f"data.sources.{name}.source": given.source for name, given in (config.data.sources or {}).items()},
        }
        return path, [
            f"{key}={json.dumps(_seen_from_here(place, config.output_dir, path.parent))}"
            for key, place in places.items()
            if place is not None
        ]
    export = read_description(masks)
    if export.base_model_name_or_path is None:
        return None, []
    return None, [
        f"model.name={json.dumps(export.base_model_name_or_path)}",
        f"model.dtype={export.modules[0].dtype}",
    ]


def _seen_from_here(place: str, output_dir: str, run: Path) -> str:
    """Return a path of a run's configuration, relative to where its output_dir is, as seen from here."""
    if place in (*SHORTHANDS, *NAMED) or os.path.isabs(place) != os.path.isabs(output_dir):
        return place
    found = os.path.normpath(run / os.path.relpath(place, output_dir))
    if not os.path.exists(found):
        return place
    as_written = os.path.exists(place) and (os.path.isabs(place) or os.path.samefile(place, found))
    return place if as_written else found


def _source(path: Path | None, masks: Path) -> str:
    return f"from {f'the masks in {masks}' if path is None else path} unless given"


def _name(model: ModelConfig) -> str:
    return one_line(model.name if model.revision is None else f"{model.name} at {model.revision}")


def _words(kind: str | None, quantize_masked: bool) -> str:
    if kind is None:
        return "exact weights"
    return f"{kind} weights{'' if quantize_masked else ', those of masked layers exact'}"
