"""Load a study from strict YAML and overrides, and turn it back into plain values."""

import dataclasses
from pathlib import Path
from typing import Any

from mft.checks import shown
from mft.config import HELD_OUT_SHARE
from mft.config_file import FOREIGN_NAMES, find_config, plain_values, read_mapping
from mft.files.json_schema import schema_of
from mft.files.nested import Nested
from mft_study.arms.arm import Arm
from mft_study.arms.kinds import KINDS
from mft_study.config import CROSS_ENTROPY, StudyConfig

SHIPPED = Path(__file__).parent / "configs"  # the shipped studies; --config takes their names
_NEEDED = ("arms", "domains")
_ONLY_DOMAIN = "data."  # begins an override, as in mft train
_FROM_ARMS = ("lr", "steps", "epochs", "seed")  # keys of full, stage and rewards that arms and seeds decide
_STUDY = Nested(StudyConfig, "stage.batch_size=8", FOREIGN_NAMES)


def load_study(name: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> StudyConfig:
    """Load a study from a shipped file (such as "small") or a path, and apply overrides such as arms.MFT.lrs=[1e-3].

    In a study with one domain, data.KEY is a key of that domain.
    Raises: ValueError that names the file or the override, the key, the rule and the value.
    """
    path = find_config(name, SHIPPED)
    values = read_mapping(path)
    origin = f"{path}: "
    for override in overrides:
        _STUDY.apply_override(values, _domain_override(override, values))
    after = f" (with the overrides {' '.join(overrides)})" if overrides else ""
    for section in ("full", "stage", "rewards"):
        for key in _FROM_ARMS:
            if isinstance(values.get(section), dict) and key in values[section]:
                where = "seeds" if key == "seed" else "arms"
                raise ValueError(f"{origin}{section}.{key} must be left out: {where} decide it{after}")
    for section in _NEEDED:
        if not values.get(section):
            raise ValueError(f"{origin}{section} must hold at least one name, got {shown(values.get(section))}{after}")
    return _STUDY.build(values, path, overrides)


def study_values(study: StudyConfig) -> dict[str, Any]:
    """Return plain values for load_study, without later keys that have no effect, so that older studies are equal."""
    values = plain_values(dataclasses.asdict(study))
    for section in ("full", "stage", "rewards"):
        for key in _FROM_ARMS:
            values[section].pop(key, None)
    for train in (values["full"], values["stage"], (values["scratch"] or {}).get("train", {})):
        if train.get("batches_at_once", 0) is None:
            del train["batches_at_once"]
        if train.get("reduce_every") == "step":
            del train["reduce_every"]
    texts = (values["domains"], values["general"], values["questions"], {"": (values["scratch"] or {}).get("data", {})})
    for data in (data for section in texts for data in section.values()):
        for key in ("validation_share", "test_share"):
            if data.get(key) == HELD_OUT_SHARE:
                del data[key]
    if study.objective == CROSS_ENTROPY:
        del values["objective"], values["rewards"], values["questions"]
    for keys, pattern in ((values["mask"], "matrix"), *((arm, None) for arm in values["arms"].values())):
        if keys.get("budget") is None:
            for key in ("budget", "budget_ramp", "fill_budget"):
                keys.pop(key, None)
        for key, default in (("pattern", pattern), ("weight_decay", None)):
            if keys.get(key) == default:
                keys.pop(key, None)
    for name in ("vary", "leaders"):
        if not values[name]:
            del values[name]
    return values


def study_schema() -> dict[str, Any]:
    """Return the JSON Schema of a study's file."""
    schema = schema_of(StudyConfig, "A study of mft compare")
    for section in ("full", "stage", "rewards"):
        schema["properties"][section]["properties"] = dict.fromkeys(_FROM_ARMS, False)
    arm = schema["$defs"][Arm.__name__]
    kinds = {cls: [kind for kind, one in KINDS.items() if one is cls] for cls in KINDS.values()}
    for cls, names in kinds.items():
        arm["description"] += f" {', '.join(names)}: {' '.join((cls.__doc__ or '').split())}"
        arm["properties"] |= schema_of(cls, "")["properties"] | arm["properties"]  # the kind's own keys
    arm["properties"]["kind"] |= {"enum": list(KINDS)}
    return schema


def _domain_override(override: str, values: dict[str, Any]) -> str:
    """Turn an override of data.KEY into one of the only domain; return any other as it is."""
    if not override.lstrip().startswith(_ONLY_DOMAIN):
        return override
    key, domains = override.lstrip().removeprefix(_ONLY_DOMAIN), list(values.get("domains") or ())
    if len(domains) != 1:
        raise ValueError(
            f"override {override!r}: must be data.KEY, in a study of one domain; its domains are {', '.join(domains)}"
        )
    return f"domains.{domains[0]}.{key}"
