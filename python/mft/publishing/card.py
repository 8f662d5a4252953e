"""The model card, README.md of a repository on the hub. It depends only on facts: the same facts give the same card.

Its last line holds the hash of the lines before it, which tells an edited card from a generated one.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData, try_to_load_from_cache

from mft.config import RunConfig, layer_ranges
from mft.config_file import config_values
from mft.data.sources import NAMED
from mft.files.hub import split_hub_id
from mft.files.regular_file import read_regular
from mft.files.yaml_file import dump_yaml, parse_yaml
from mft.publishing.contents import README, Contents
from mft.publishing.facts import Facts, Results
from mft.publishing.markdown import base_in_a_sentence, block, hide_directory, hub_base, short_line, table, text

_MADE = re.compile(r"\n<!-- made by mft push of what it read, sha256:([0-9a-f]{64}); edited, it is yours -->\n\Z")
_HEAD = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
_MOST = 1 << 20  # most bytes of a card that is read
_LICENSE = ("license", "license_name", "license_link")


def model_card(contents: Contents, repository: str, license: Mapping[str, Any] | None = None) -> str:
    """Return the card of contents in a repository. Without license, the card names none."""
    facts = contents.facts
    sources = [] if facts.config is None else facts.config.data.every_source
    data = ModelCardData(
        base_model=hub_base(facts.base_model_name_or_path),
        datasets=[name for name in sources if name not in NAMED and split_hub_id(name) and not Path(name).exists()]
        or None,
        eval_results=_eval_results(facts) or None,
        model_name=repository.partition("/")[2] if facts.results else None,
        library_name=contents.library,
        pipeline_tag=None if facts.modules_to_save else "text-generation",  # a saved module may be another task's head
        tags=contents.tags,
        **(license or {}),
    )
    if data.base_model is not None:
        data["base_model_relation"] = contents.relation
    parts = (
        [f"# {repository}", contents.introduction()],
        ["## Loading", *contents.loading(repository)],
        _setting(contents),
        [] if facts.results is None else _results(facts.results),
        [] if facts.config is None else _training(facts.config),
    )
    body = "\n\n".join(line for part in parts for line in part)
    card = f"---\n{data.to_yaml()}\n---\n\n{body}\n"
    digest = hashlib.sha256(card.encode()).hexdigest()
    return f"{card}\n<!-- made by mft push of what it read, sha256:{digest}; edited, it is yours -->\n"


def read_card(path: Path) -> str:
    """Return the text of a card, which may be damaged. Raises: as read_regular."""
    return read_regular(path, _MOST).decode("utf-8", errors="replace")


def is_made(card: str) -> bool:
    """Return whether card is unchanged since model_card made it."""
    found = _MADE.search(card)
    return found is not None and hashlib.sha256(card[: found.start()].encode()).hexdigest() == found[1]


def license_of(base: str | None) -> dict[str, str]:
    """Return what a base's card says about its license, if the card is on this machine. The hub is not asked."""
    if base is None:
        return {}
    path = Path(base) / README
    if not os.path.isfile(path):  # Path.is_file() raises if the name is too long for a file
        cached = None if hub_base(base) is None else try_to_load_from_cache(str(hub_base(base)), README)
        if not isinstance(cached, str):
            return {}
        path = Path(cached)
    head = _HEAD.match(read_card(path))
    values = parse_yaml(head[1], str(path)) if head else None
    found = values if isinstance(values, dict) and isinstance(values.get("license"), str) else {}
    return {key: short_line(found[key]) for key in _LICENSE if isinstance(found.get(key), str)}


# ---------------------------------------------------------------------------------------------- parts of it


def _setting(contents: Contents) -> list[str]:
    facts, layers = contents.facts, contents.facts.layers_to_transform
    if facts.mode is None:
        return []
    kept = None
    if facts.kept is not None and facts.weights:
        kept = f"{100 * facts.kept / facts.weights:.2f} % of {facts.weights} weights"
    rows = {
        "base": facts.base_model_name_or_path and base_in_a_sentence(facts.base_model_name_or_path),
        "weights of the base": facts.base_hash and text(facts.base_hash),
        "dtype": facts.dtype and text(facts.dtype),
        "base during training, quantised to": facts.base_quantization and text(facts.base_quantization),
        "kept": kept,
        "size": contents.size,
        "`alpha`": facts.alpha,
        "`keep_ratio`": facts.keep_ratio,
        "`mode`": text(facts.mode),
        "masked layers": facts.modules,
        "`target_modules`": facts.target_modules and text(", ".join(facts.target_modules)),
        "`layers_to_transform`": layers and layer_ranges(layers),
        "`modules_to_save`": facts.modules_to_save and text(", ".join(facts.modules_to_save)),
        "content": facts.content_hash and text(facts.content_hash),
    }
    shown = [(name, value) for name, value in rows.items() if value is not None and value != []]
    return ["## Masks", table(("", ""), shown)]


def _results(results: Results) -> list[str]:
    rows = [
        (text(name), f"{row['loss']:.4f}", f"{100 * row['accuracy']:.2f} %")
        for name, row in results.evaluations.items()
    ]
    error = "" if results.error is None else f" ± {results.error:.4f} (one standard error over documents, paired)"
    return [
        "## Results",
        "On the validation split, in nats per token; accuracy is that of the next token.",
        table(("", "loss", "accuracy"), rows),
        f"Loss after - before: {results.difference:+.4f}{error}. Before is the base as it was; training "
        "the same layers' weights on may gain as much.",
    ]


def _training(config: RunConfig) -> list[str]:
    values = config_values(config)
    del values["output_dir"], values["checkpoint_minutes"]  # settings of the machine
    del values["coding"]  # describes the run's files; the published ones may have another
    values["model"]["name"] = hide_directory(config.model.name)
    paths = [(values["model"], "chat_template"), (values["data"], "source"), (values["objective"], "teacher")]
    paths += [(part, "source") for part in (values["data"]["sources"] or {}).values()]
    for section, key in paths:
        if section[key] is not None:
            section[key] = hide_directory(section[key])
    return ["## Training", block("yaml", [dump_yaml(values).strip()])]


def _eval_results(facts: Facts) -> list[EvalResult]:
    after = None if facts.results is None else facts.results.evaluations.get("after")
    if after is None or facts.config is None:
        return []
    source = short_line(", ".join(hide_directory(name) for name in facts.config.data.every_source))
    names = {"loss": "validation loss, nats per token", "accuracy": "validation accuracy of the next token"}
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=source,
            dataset_name=source,
            dataset_split="validation",
            metric_type=key,
            metric_name=name,
            metric_value=after[key],
        )
        for key, name in names.items()
    ]
