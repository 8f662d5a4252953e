"""The model card: README.md of a repository on the hub, made of facts alone; the same facts give the same card.

Its last line holds the hash of those before, so that a card that somebody has edited is told from one that was made.
Many facts are texts of files that strangers may have written: each stays on one line, and is neither Markdown nor HTML.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData, try_to_load_from_cache

from mft.config import CODINGS, ModelConfig, RunConfig, layer_ranges
from mft.config_file import config_values
from mft.data.sources import NAMED
from mft.files.hub import split_hub_id
from mft.files.regular_file import read_regular
from mft.files.yaml_file import dump_yaml, parse_yaml
from mft.masks.inspection import said_of_size
from mft.models.pretrained import SHORTHANDS
from mft.publishing.contents import README, Contents
from mft.publishing.facts import Facts, Results

# What our shorthands are dequantised from.
_OF_SHORTHANDS = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
_RELATIONS = {"masks": "adapter", "adapter": "adapter", "model": "finetune"}  # the hub's words
_PAPER = "[Mask Fine-Tuning](https://arxiv.org/abs/2503.22764)"
_MADE = re.compile(r"\n<!-- made by mft push of what it read, sha256:([0-9a-f]{64}); edited, it is yours -->\n\Z")
_HEAD = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
_MOST = 1 << 20  # bytes of a card that is read
_LICENSE = ("license", "license_name", "license_link")
_LONGEST = 500  # characters of a fact
_PLAIN = re.compile(r"(?!.*(://|www\.))[\w .,:;%()+/=±-]*")  # what Markdown leaves as it is


def model_card(contents: Contents, repository: str, license: Mapping[str, Any] | None = None) -> str:
    """The card of contents in a repository; without a license it names none."""
    facts = contents.facts
    data = ModelCardData(
        base_model=hub_base(facts.base_model_name_or_path),
        datasets=_datasets(facts.config),
        eval_results=_eval_results(facts) or None,
        model_name=repository.partition("/")[2] if facts.results else None,
        library_name="transformers" if contents.kind == "model" else "mft_kernels",
        pipeline_tag=None if facts.modules_to_save else "text-generation",  # a head of another task, perhaps
        tags=_tags(contents),
        **(license or {}),
    )
    if data.base_model is not None:
        data["base_model_relation"] = _RELATIONS[contents.kind]
    parts = (
        [f"# {repository}", _what(contents)],
        ["## Loading", *_loading(contents, repository)],
        _setting(contents),
        [] if facts.results is None else _results(facts.results),
        [] if facts.config is None else _training(facts.config),
    )
    text = "\n\n".join(line for part in parts for line in part)
    return _signed(f"---\n{data.to_yaml()}\n---\n\n{text}\n")


def is_made(card: str) -> bool:
    """Whether card is as model_card gave it."""
    found = _MADE.search(card)
    return found is not None and hashlib.sha256(card[: found.start()].encode()).hexdigest() == found[1]


def hub_base(name: str | None) -> str | None:
    """The name of a base on the hub; None for one that is a path, and for none."""
    if name is None or name in SHORTHANDS:
        return _OF_SHORTHANDS.get(name or "")
    named = split_hub_id(name)
    return name if named is not None and named[1] is None and not Path(name).exists() else None


def license_of(base: str | None) -> dict[str, str]:
    """What the card of a base says of its license, if that card lies on this machine; nothing is asked for it."""
    if base is None:
        return {}
    path = Path(base) / README
    if not os.path.isfile(path):  # Path.is_file() raises if a name is too long to be one
        cached = None if hub_base(base) is None else try_to_load_from_cache(str(hub_base(base)), README)
        if not isinstance(cached, str):
            return {}
        path = Path(cached)
    head = _HEAD.match(read_regular(path, _MOST).decode("utf-8", errors="replace"))
    values = parse_yaml(head[1], str(path)) if head else None
    found = values if isinstance(values, dict) and isinstance(values.get("license"), str) else {}
    return {key: _one_line(found[key]) for key in _LICENSE if isinstance(found.get(key), str)}


# ---------------------------------------------------------------------------------------------- parts of it


def _signed(text: str) -> str:
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{text}\n<!-- made by mft push of what it read, sha256:{digest}; edited, it is yours -->\n"


def _what(contents: Contents) -> str:
    facts = contents.facts
    on = "" if facts.base_model_name_or_path is None else f" on {_named(facts.base_model_name_or_path)}"
    if contents.kind == "masks":
        return (
            f"Masks of {_PAPER}{on}: a bit for each weight says whether it is kept, the others are 0. No "
            "weight was changed. They load on the very weights that they were learned on, and are refused on others."
        )
    if contents.kind == "adapter":
        return f"Scores of {_PAPER}{on}, as PEFT saved them: from them training goes on."
    if facts.alpha is not None:
        return (
            f"An ordinary model: masks of {_PAPER}{on} are baked in by `alpha` {facts.alpha:g}, so that kept weights "
            f"are bit-equal and others scaled by {1 - facts.alpha:.6g}."
        )
    if facts.kept is not None:
        return (
            f"An ordinary model: masks of {_PAPER}{on} are baked in, so that kept weights are bit-equal and others 0."
        )
    return f"An ordinary model, all of whose weights were fine-tuned{on}." if on else "An ordinary model."


def _loading(contents: Contents, repository: str) -> list[str]:
    if contents.kind == "model":
        lines = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{repository}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{repository}")',
        ]
        return [_block("python", lines)]
    given = _base(contents.facts)
    through_peft = [
        "from peft import PeftModel",
        "",
        "import mft.masks.peft  # the method MFT",
        "",
        f"base, tokenizer = mft.load_model({given})",
        f'model = PeftModel.from_pretrained(base, "{repository}")',
    ]
    if contents.kind == "adapter":
        return [_block("python", through_peft)]
    ours = [
        "import mft",
        "",
        f"model, tokenizer = mft.load_model({given})",
        f'mft.load_masks(model, "{repository}")',
        "mft.merge_model(model)  # an ordinary model: kept weights bit-equal, dropped ones 0",
    ]
    blocks = [_block("python", ours), _block("sh", [f"mft merge {repository} merged"])]
    if contents.facts.modules_to_save:
        return blocks
    return [*blocks, "Through PEFT:", _block("python", through_peft)]


def _base(facts: Facts) -> str:
    """What load_model takes for the base, as it stands in a program."""
    name = facts.base_model_name_or_path
    config = None if facts.config is None or facts.config.model.name != name else facts.config.model
    given = {"revision": None if config is None else config.revision, "dtype": facts.dtype}
    beside = [f"{key}={json.dumps(v)}" for key, v in given.items() if v not in (None, getattr(ModelConfig(), key))]
    base = json.dumps("path/to/the/base" if name is None or len(name) > _LONGEST else _shown(name))
    return f"mft.ModelConfig({', '.join([base, *beside])})" if beside else base


def _setting(contents: Contents) -> list[str]:
    facts, layers = contents.facts, contents.facts.layers_to_transform
    rows = {
        "base": facts.base_model_name_or_path and _named(facts.base_model_name_or_path),
        "weights of the base": facts.base_hash and _text(facts.base_hash),
        "dtype": facts.dtype and _text(facts.dtype),
        "while they learned, the base was in": facts.base_quantization and _text(facts.base_quantization),
        "kept": _kept(facts),
        "size": _size(contents),
        "`alpha`": facts.alpha,
        "`keep_ratio`": facts.keep_ratio,
        "`mode`": facts.mode and _text(facts.mode),
        "masked layers": facts.modules,
        "`target_modules`": facts.target_modules and _text(", ".join(facts.target_modules)),
        "`layers_to_transform`": layers and layer_ranges(layers),
        "`modules_to_save`": facts.modules_to_save and _text(", ".join(facts.modules_to_save)),
        "content": facts.content_hash and _text(facts.content_hash),
    }
    shown = [(name, value) for name, value in rows.items() if value is not None and value != []]
    return ["## Masks", _table(("", ""), shown)] if facts.mode is not None else []


def _results(results: Results) -> list[str]:
    rows = [
        (_text(name), f"{row['loss']:.4f}", f"{100 * row['accuracy']:.2f} %")
        for name, row in results.evaluations.items()
    ]
    return [
        "## Results",
        "On the validation split, in nats a token; accuracy is that of the next token.",
        _table(("", "loss", "accuracy"), rows),
        f"Loss after - before: {results.difference:+.4f} ± {results.error:.4f} (one standard error over documents, "
        "paired). Before is the base as it was; training the same layers' weights on may gain as much.",
    ]


def _training(config: RunConfig) -> list[str]:
    values = config_values(config)
    del values["output_dir"], values["checkpoint_minutes"]  # of the machine
    del values["coding"]  # of the run's files, not of those here
    values["model"]["name"] = _shown(config.model.name)
    paths = [(values["model"], "chat_template"), (values["data"], "source"), (values["objective"], "teacher")]
    paths += [(part, "source") for part in (values["data"]["sources"] or {}).values()]
    for section, key in paths:
        if section[key] is not None:
            section[key] = _shown(section[key])
    return ["## Training", _block("yaml", [dump_yaml(values).strip()])]


def _eval_results(facts: Facts) -> list[EvalResult]:
    after = None if facts.results is None else facts.results.evaluations.get("after")
    if after is None or facts.config is None:
        return []
    source = _one_line(", ".join(_shown(name) for name in facts.config.data.every_source))
    names = {"loss": "validation loss, nats a token", "accuracy": "validation accuracy of the next token"}
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


def _tags(contents: Contents) -> list[str] | None:
    if contents.kind == "model":
        return None if contents.facts.mode is None else ["mask-fine-tuning", "mft"]
    return ["mask-fine-tuning", "mft", "peft"]


def _datasets(config: RunConfig | None) -> list[str] | None:
    given = [] if config is None else config.data.every_source
    return [one for one in given if one not in NAMED and split_hub_id(one) and not Path(one).exists()] or None


def _kept(facts: Facts) -> str | None:
    if facts.kept is None or not facts.weights:
        return None
    return f"{100 * facts.kept / facts.weights:.2f} % of {facts.weights} weights"


def _size(contents: Contents) -> str | None:
    if contents.size is None or not contents.facts.weights:
        return None
    coded = "" if contents.coding == CODINGS[0] else "; entropy-coded, which mft of format 3 reads"
    beside = contents.facts.modules_to_save
    said = said_of_size(contents.size, contents.facts.weights, beside and [_text(", ".join(beside))])
    return said + coded


def _named(base: str) -> str:
    """A base in a sentence: a link where the hub has it."""
    found = hub_base(base)
    if base in SHORTHANDS:
        return f"`{base}` ([{found}](https://huggingface.co/{found}), dequantised as mft fetches it)"
    return _code(_shown(base)) if found is None else f"[{base}](https://huggingface.co/{base})"


def _shown(name: str) -> str:
    """A name as it is, of a path the last part: the directories of a machine are nobody's business."""
    is_path = name.startswith(("/", ".", "~")) or name.count("/") > 1 or os.path.exists(name)
    return Path(name).name if is_path and name not in (*SHORTHANDS, *NAMED) else name


def _one_line(text: str) -> str:
    """With line ends and whatever else is not seen written as Python writes it, and of bounded length."""
    escaped = (
        c.encode("unicode_escape").decode() if c == "\\" or not c.isprintable() else c for c in text[: _LONGEST + 1]
    )
    seen = "".join(escaped)
    return seen if len(seen) <= _LONGEST else seen[: _LONGEST - 3] + "..."


def _text(text: str) -> str:
    """A fact in Markdown: as it is, or as code if Markdown might make something else of it."""
    return text if len(text) <= _LONGEST and _PLAIN.fullmatch(text) else _code(text)


def _code(text: str) -> str:
    """A fact as code in a line, between more backticks than it has."""
    text = _one_line(text)
    fence = _fence(text, 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def _fence(text: str, least: int) -> str:
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def _block(language: str, lines: Sequence[str]) -> str:
    text = "\n".join(lines)
    fence = _fence(text, 3)
    return f"{fence}{language}\n{text}\n{fence}"


def _table(head: tuple[str, ...], rows: Sequence[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
