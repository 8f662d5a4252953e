"""A study on disk: what every finished unit found, and the trained weights that may still be needed.

    output_dir/study.yaml                             what was declared
               base/                                  the model from scratch, if there is one
               bases/<seed>/                          or one per seed
               units/<domain>/<arm>/<key>.json        an Outcome
               trained/<domain>/<arm>/<key>.safetensors
               test/<domain>/<arm>/<key>.json         a Tested; test/openings.json: each set of models that test saw
               leases/, alike.json                    who works on what, and what all must have alike (see shared/)
               table.md, table.json, sums.npz, plot.png, bytes.png, forgetting.png

A unit's key is a hash of all that determines its result, so results stay valid while arms, domains, seeds and rates are
added. Files appear whole or not at all.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from mft.checks import check_rule
from mft.data.reserve import RESERVE
from mft.files.atomic import remove, sweep, target_of, write_whole
from mft.files.json_file import is_list_of, parse_value, short
from mft.files.yaml_file import dump_yaml, parse_yaml
from mft.tracking.curves import PLOT
from mft.training.run_directory import ABLATION, TABLE_JSON, TABLE_MARKDOWN
from mft.training.run_lock import LOCK, hold
from mft_study.arms.full import Full
from mft_study.arms.means import Average
from mft_study.arms.setting import CHOICES, Setting
from mft_study.config import CROSS_ENTROPY, StudyConfig
from mft_study.evidence.reserve_ledger import open_reserve, reserve_texts
from mft_study.evidence.sums import FILE as SUMS
from mft_study.load import study_values
from mft_study.outcome import Outcome, Tested, Unit, outcome_from, outcome_values, tested_from, tested_values
from mft_study.shared.claims import Alone, Claims, Joined
from mft_study.shared.leases import FOLDER, JOINED, Leases, Pace, open_leases
from mft_study.study_plan import Chosen, best_so_far, chosen_settings, source_of, start_of, teachers_of

FORMAT = 2  # increase it when the same declaration gives other results
STUDY, BASE_MODEL, BASES, UNITS, TRAINED, TEST = "study.yaml", "base", "bases", "units", "trained", "test"
ALIKE = "alike.json"
FORGETTING = "forgetting.png"
BYTES = "bytes.png"
_OURS = {
    STUDY,
    BASE_MODEL,
    BASES,
    UNITS,
    TRAINED,
    TEST,
    LOCK,
    TABLE_MARKDOWN,
    TABLE_JSON,
    SUMS,
    ABLATION,
    FOLDER,
    ALIKE,
}
_OURS |= {PLOT, FORGETTING, BYTES, "rewards.png", "summary.png", "surface.png", "overlap.png"}  # pictures
_NFS = ".nfs"  # begins the name of a file that was deleted on NFS while a process had it open
_CHECKSUM = "checksum"  # key of a result's file: of its other values and of the file's name
_OPENINGS, _REPORTED = "openings.json", "reported.json"
_FREE = ("output_dir", "workers")  # keys that do not change any result
_OF_OTHERS = ("start", "of", "teacher")  # an arm's keys that name other arms: hashed by the runs that they stand for
_OF_ANSWERS = ("max_completion_tokens", "verifier")  # keys of rewards: how a model's answers are read
_OPTIONS = ("config", "formats")  # an arm's keys with options: a setting holds the options that it ran with
_CHOOSES = ("max_bytes",)  # decides which setting is chosen, but not the result of a setting

Result = TypeVar("Result", Outcome, Tested)


@contextlib.contextmanager
def open_store(
    study: StudyConfig,
    directory: str | os.PathLike,
    *,
    overwrite: bool = False,
    joins: bool = False,
    say: Callable[[str], None] = lambda words: None,
    pace: Pace | None = None,
) -> Iterator["Store"]:
    """Open the study's directory: create it, or continue what it holds.

    joins, pace: as for run_study. say: called with messages about other processes.
    Raises: ValueError if the directory holds anything else, or a study that differs by more than additions;
        RuntimeError if another process has the directory open and does not share it.
    """
    path = Path(directory)
    check_place(study, path, overwrite=overwrite, joins=joins)
    with hold(path, shared=joins):
        _check_unchanged(path, study, overwrite)
        with open_leases(path, say, joins=joins, pace=pace) as leases:
            if joins:
                with leases.holding("study"):
                    _declare_beside(path, study, leases)
            else:
                sweep(path, _OURS.__contains__)
                if overwrite:
                    _empty(path)
                write_whole(path / STUDY, dump_yaml(study_values(study)))
            store = Store(study, path, Joined(leases) if joins else Alone())
            store.clear_scratch()
            yield store


def check_place(study: StudyConfig, path: Path, *, overwrite: bool, joins: bool) -> None:
    """Raise ValueError, as open_store does, if a directory holds anything else, or a study that differs."""
    if joins:
        check_rule(not overwrite, "--join", "not come with --overwrite, which deletes what others work on", path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"output_dir must be a directory, got the file {path}")
    names = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
    if foreign := [name for name in names if not name.startswith(_NFS) and (target_of(name) or name) not in _OURS]:
        raise ValueError(
            f"output_dir must be new, empty or a study's, got {path} with {', '.join(foreign[:3])}: name another one"
        )
    _check_unchanged(path, study, overwrite)


def copy_fine_tunes(parent: str | os.PathLike, study: StudyConfig, directory: str | os.PathLike) -> int:
    """Copy another study's base model and its runs of base and full fine-tune into study's new directory.

    Unit keys decide which of these runs study reuses. Returns: the number of files copied; 0 if directory is not empty,
    or parent is not a study of the same model.
    """
    source, target = Path(parent), Path(directory)
    new = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    if not new or not (source / STUDY).is_file():
        return 0
    values, now = _declared(source / STUDY), study_values(study)
    if any(values.get(name) != now[name] for name in ("model", "scratch")):
        return 0
    shared = [path for folder in (BASE_MODEL, BASES) for path in source.glob(f"{folder}/**/*") if path.is_file()]
    for folder in (UNITS, TRAINED):
        for name, arm in study.arms.items():
            if not arm.follows:
                shared += source.glob(f"{folder}/*/{name}/[!.]*")  # a leading dot: still being written
    for path in shared:
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)
    if shared:
        write_whole(target / STUDY, dump_yaml(now))
    return len(shared)


def fine_tunes_in(parent: str | os.PathLike, study: StudyConfig) -> int:
    """Return how many runs of study's full fine-tune parent holds. Raises: ValueError if it is no study's directory."""
    if not (Path(parent) / STUDY).is_file():
        raise ValueError(f"--fine-tunes-of must be the output_dir of a study, got {parent} without a {STUDY}")
    return sum(outcome.unit.arm == study.first_of_kind(Full) for outcome in Store(study, Path(parent)).outcomes())


class Store:
    """The files of one study."""

    def __init__(self, study: StudyConfig, directory: Path, claims: Claims | None = None) -> None:
        self.study, self.directory, self.claims = study, directory, claims or Alone()
        self._outcomes: dict[Path, Outcome] = {}
        self._hashes: dict[Any, str] = {}  # by a unit and the keys of what it needs: each look asks for all of them
        self._values = study_values(study)

    def key(self, unit: Unit, chosen: Chosen) -> str:
        """Return a hash of all that determines the unit's result. chosen: the settings of the arms that it needs."""
        start, source = start_of(self.study, chosen, unit), source_of(self.study, chosen, unit)
        teachers = teachers_of(self.study, chosen, unit)
        needs = (
            None if start is None else self.key(start, chosen),
            None if source is None else self.key(source, chosen),
            None if teachers is None else tuple(self.key(teacher, chosen) for teacher in teachers[-1:]),
        )
        if (unit, needs) not in self._hashes:
            self._hashes[unit, needs] = self._hashed(unit, *needs)
        return self._hashes[unit, needs]

    def _hashed(self, unit: Unit, start: str | None, source: str | None, teacher: tuple[str, ...] | None) -> str:
        values, arm, config = self._values, self._values["arms"][unit.arm], self.study.arms[unit.arm]
        parts: dict[str, Any] = {
            "format": FORMAT,
            "domain": _training_values(values["domains"][unit.domain]),
            "arm": {key: value for key, value in _drop_grid(arm).items() if key not in _OF_OTHERS},
            "unit": {"seed": unit.seed, "setting": _setting_values(unit.setting), "part": unit.part},
            "of": _drop_grid(values["arms"][arm["of"]]) if isinstance(config, Average) else None,
            "start": start,
            "source": source,
            "teacher": teacher,
            "stage": values["stage"] if config.follows else None,
        }
        parts |= {name: values[name] for name in ("model", "scratch", "mask", "full", "checkpoints")}
        parts["general"] = {
            name: _training_values(values["general"][name]) for name in self.study.general_of(unit.domain)
        }
        if self.study.vary:
            parts["vary"] = sorted(self.study.vary)
        if self.study.objective != CROSS_ENTROPY:
            learns = config.follows  # the other arms only answer
            rewards = {name: value for name, value in values["rewards"].items() if learns or name in _OF_ANSWERS}
            parts |= {"objective": values["objective"], "rewards": rewards}
            if learns and unit.domain in values["questions"]:
                parts["questions"] = values["questions"][unit.domain]
        return _digest(parts)

    def outcomes(self) -> list[Outcome]:
        """Return the stored outcomes whose keys still match the study."""
        study, paths = self.study, sorted(self.directory.glob(f"{UNITS}/*/*/*.json"))

        def is_declared(unit: Unit) -> bool:
            return unit.domain in study.domains and unit.arm in study.arms and unit.seed in study.all_seeds

        self._outcomes = {path: self._outcomes.get(path) or _read_as(outcome_from, path) for path in paths}
        found = [(path.stem, outcome) for path, outcome in self._outcomes.items()]
        known = [(key, outcome) for key, outcome in found if is_declared(outcome.unit)]
        valid: list[Outcome] = []
        chosen: Chosen = {}
        arms = list(self.study.arms)
        while arms:  # arms that others need come first
            ready = [arm for arm in arms if not set(self.study.needs(arm)) & set(arms)]
            valid += [
                outcome
                for key, outcome in known
                if (unit := outcome.unit).arm in ready
                and all(needed in chosen.get(unit.domain, {}) for needed in self._key_arms(unit.arm))
                and key == self.key(unit, chosen)
            ]
            chosen = chosen_settings(self.study, valid)
            arms = [arm for arm in arms if arm not in ready]
        return valid

    def path(self, unit: Unit, chosen: Chosen) -> Path:
        """Return where a unit's outcome lies, or will lie."""
        return self._path(UNITS, unit, self.key(unit, chosen), "json")

    def tell_outcome(self, outcome: Outcome, path: Path, own: Path | None = None, trained: Path | None = None) -> None:
        """Write an outcome to its path. own: where its weights are now, if they must still be moved to trained."""
        self.claims.tell(path, _sealed_json(path, outcome_values(outcome)), own, trained)
        self._outcomes.pop(path, None)

    def check_outcome(self, unit: Unit, path: Path) -> None:
        """Raise ValueError if the file at a unit's path holds another unit's outcome."""
        _check_unit(unit, _read_as(outcome_from, path).unit, path)

    def trained_path(self, unit: Unit, chosen: Chosen) -> Path:
        """Return where the trained weights of a unit lie, or will lie."""
        return self._path(TRAINED, unit, self.key(unit, chosen), "safetensors")

    def prune(self, outcomes: Iterable[Outcome], chosen: Chosen) -> None:
        """Delete trained weights of settings that are not the best of their arm so far."""
        outcomes = list(outcomes)
        best = best_so_far(self.study, outcomes)
        for outcome in outcomes:
            unit = outcome.unit
            if unit.setting != best.get((unit.domain, unit.arm)):
                self.trained_path(unit, chosen).unlink(missing_ok=True)

    def clear_scratch(self) -> None:
        """Delete what killed processes left half-written: weights, bases, and if alone results. Raises: NotWritten."""
        bases = [*self.directory.glob(f".{BASE_MODEL}.*"), *self.directory.glob(f"{BASES}/.*")]
        folders = (TRAINED,) if self.claims.shares else (UNITS, TRAINED, TEST)
        for path in [*bases, *(path for folder in folders for path in self.directory.glob(f"{folder}/*/*/.*"))]:
            target, inner = path.name, target_of(path.name)
            while inner is not None:  # a file that becomes a scratch file has a scratch name inside its own
                target, inner = inner, target_of(inner)
            claim = claim_of_base(Path(target)) if path in bases else Path(target).stem
            if target != path.name and self.claims.take(claim, lambda: False):
                try:
                    if path.exists():
                        remove(path)
                finally:
                    self.claims.release(claim)

    def tested(self, unit: Unit, chosen: Chosen) -> Tested | None:
        path = self.test_path(unit, chosen)
        if not path.is_file():
            return None
        tested = _read_as(tested_from, path)
        _check_unit(unit, tested.unit, path)
        return tested

    def tell_tested(self, tested: Tested, path: Path) -> None:
        """Write what test found to its path."""
        self.claims.tell(path, _sealed_json(path, tested_values(tested)))

    def open_test(self, units: list[Unit], chosen: Chosen) -> int:
        """Record that test will see these units' models. Returns: how many different sets of models it has seen."""
        keys, path = self._keys(units, chosen), self.directory / TEST / _OPENINGS

        def openings() -> list[list[str]]:
            return _read_list(path, list) if path.is_file() else []

        self.claims.call_once(
            "test", lambda: keys in openings(), lambda: write_whole(path, json.dumps([*openings(), keys]))
        )
        return len(openings())

    def open_reserve(self, units: list[Unit], chosen: Chosen, *, again: bool) -> list[str]:
        """Record the same for the reserve, if it is the test, by one of the processes. Returns: who has opened it.

        Raises: as open_reserve.
        """
        if not reserve_texts(self.study):
            return []
        models = _digest(self._keys(units, chosen))
        path = self.directory / TEST / f"reserve-{models}.json"

        def open_it() -> None:
            found = open_reserve(self.study, self.directory, models, again=again)
            write_whole(path, json.dumps([entry["study"] for entry in found]))

        self.claims.call_once("reserve", lambda: self.claims.shares and path.is_file(), open_it)
        return _read_list(path, str)

    def report_once(self, units: list[Unit], chosen: Chosen, report: Callable[[], None]) -> bool:
        """Report what test found for these units, in one of the processes. Returns: whether it was this one."""
        keys, path = self._keys(units, chosen), self.directory / TEST / _REPORTED

        def is_done() -> bool:
            tables = self.directory / TABLE_JSON
            return self.claims.shares and tables.is_file() and path.is_file() and _read(path) == keys

        def make() -> None:
            report()
            write_whole(path, json.dumps(keys))

        return self.claims.call_once("report", is_done, make)

    def _keys(self, units: list[Unit], chosen: Chosen) -> list[str]:
        return sorted(self.key(unit, chosen) for unit in units)

    def _key_arms(self, arm: str) -> list[str]:
        """Return the arms whose chosen settings enter an arm's keys. An average shares its source's setting."""
        return [name for name in self.study.needs(arm) if self.study.chooser(arm) != name]

    def _path(self, folder: str, unit: Unit, key: str, suffix: str) -> Path:
        return self.directory / folder / unit.domain / unit.arm / f"{key}.{suffix}"

    def test_path(self, unit: Unit, chosen: Chosen) -> Path:
        """Return where a unit's Tested lies, or will lie."""
        parts: list[Any] = [self.key(unit, chosen), unit.domain in self.study.answers]
        parts += [opened] if (opened := reserve_texts(self.study)) else []
        return self._path(TEST, unit, _digest(parts), "json")


def claim_of_base(path: Path) -> str:
    """Return the name of the claim on training the base model at path."""
    return f"base-{path.name}"


# ---------------------------------------------------------------------------------------------- private


def _training_values(data: dict[str, Any]) -> dict[str, Any]:
    """Return the values of data as training and validation see them; the reserve changes nothing there."""
    return data | {"subset": None} if data["subset"] == RESERVE else data


def _drop_grid(arm: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in arm.items() if key not in (*CHOICES, *_OPTIONS, *_CHOOSES)}


def _setting_values(setting: Setting) -> dict[str, Any]:
    """Return a setting's values; without options, config is left out, as in the keys of studies before options."""
    values = dataclasses.asdict(setting)
    return values if setting.config is not None else {key: values[key] for key in values if key != "config"}


def _digest(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def _read(path: Path) -> Any:
    try:
        return parse_value(path.read_bytes(), path)
    except ValueError as error:
        raise _other(path, error) from None


def _read_list(path: Path, kind: type) -> list[Any]:
    values = _read(path)
    if not is_list_of(values, kind):
        raise _other(path, short(values))
    return values


def _read_as(kind: Callable[[Any], Result], path: Path) -> Result:
    values = _read(path)
    if not isinstance(values, dict):
        raise _other(path, short(values))
    seal = values.pop(_CHECKSUM, None)  # older files have none
    if seal not in (None, _checksum(path, values)):
        raise _other(path, "another unit's, or changed values")
    try:
        return kind(values)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _other(path, f"{error!r} from its values") from None


def _check_unit(unit: Unit, found: Unit, path: Path) -> None:
    if found != unit:
        raise _other(path, f"the result of {found} in place of {unit}")


def _other(path: Path, found: Any) -> ValueError:
    return ValueError(f"{path} must be the JSON that was written, got {found}: delete it to run it again")


def _sealed_json(path: Path, values: dict[str, Any]) -> str:
    return json.dumps(values | {_CHECKSUM: _checksum(path, values)}, allow_nan=False)


def _checksum(path: Path, values: dict[str, Any]) -> str:
    return _digest([path.stem, values])


def _declared(path: Path) -> dict[str, Any]:
    """Return what a study.yaml declares. Raises: ValueError that names it."""
    values = parse_yaml(path.read_text(encoding="utf-8", errors="replace"), str(path))
    keys = set(values) if isinstance(values, dict) else set()
    if not {"domains", "arms"} <= keys or not all(isinstance(values[key], dict) for key in ("domains", "arms")):
        raise ValueError(f"{path} must declare a study, got other YAML: name another output_dir, or pass --overwrite")
    return values


def _declare_beside(path: Path, study: StudyConfig, leases: Leases) -> None:
    """Write what was declared. It must not change while other processes work on the study."""
    _check_unchanged(path, study, False)
    if not (path / STUDY).is_file():
        write_whole(path / STUDY, dump_yaml(study_values(study)))
        return
    before, now = _declared(path / STUDY), study_values(study)
    differs = changed_keys(before, now, additions=False)
    if differs and leases.has_others(JOINED):
        raise ValueError(
            f"--join must have the same configuration as the processes that work there, see {path / STUDY}; changed: "
            f"{'; '.join(differs)}. Give the same configuration and overrides, or stop the other processes first to "
            "add to it"
        )
    if differs:
        write_whole(path / STUDY, dump_yaml(now))


def _empty(directory: Path) -> None:
    for entry in sorted(directory.iterdir(), key=lambda entry: entry.name == STUDY):  # last: it marks the rest as ours
        if entry.name in (LOCK, FOLDER):
            continue
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _check_unchanged(directory: Path, study: StudyConfig, overwrite: bool) -> None:
    if overwrite:
        return
    path = directory / STUDY
    if not path.is_file():
        if (directory / UNITS).exists():
            raise ValueError(f"output_dir must hold {STUDY} next to {UNITS}/, {directory} lacks it: pass --overwrite")
        return
    changes = changed_keys(_declared(path), study_values(study))
    if changes:
        raise ValueError(
            f"{path} must match the given configuration: only arms, domains, seeds after the first and grid values "
            f"may be added; changed: {'; '.join(changes)}. Name another output_dir, or pass --overwrite to delete "
            "this study"
        )


def changed_keys(before: dict[str, Any], now: dict[str, Any], *, additions: bool = True) -> list[str]:
    """Return the keys, with old and new values, in which a study differs; without those that only add, if additions."""
    old, new = _flat(before), _flat(now)
    lines = []
    for key in dict.fromkeys([*old, *new]):
        if old.get(key, _ABSENT) == new.get(key, _ABSENT) or key.split("\0")[0] in _FREE:
            continue
        if additions and _is_addition(key, old, new, before):
            continue
        name = key.replace("\0", ".")
        lines.append(f"{name}: {old.get(key, 'not there')} -> {new.get(key, 'not there')}")
    return lines


_ABSENT = object()


def _is_addition(key: str, old: dict[str, Any], new: dict[str, Any], before: dict[str, Any]) -> bool:
    parts = key.split("\0")
    if parts[0] == "leaders":
        return True
    if parts[0] in ("arms", "domains") and parts[1] not in before[parts[0]]:
        return True
    if key not in old or key not in new:
        return False
    if parts[0] in ("domains", "general") and parts[-1] == "subset":
        return {old[key], new[key]} == {None, RESERVE}
    if parts[0] in ("extensions", "max_epochs"):
        return new[key] >= old[key]
    if parts[0] == "arms" and parts[2] in _OPTIONS:  # further values to choose from
        before_it = old[key] if isinstance(old[key], list) else [old[key]]
        return isinstance(new[key], list) and all(one in new[key] for one in before_it)
    if parts[0] == "seeds":
        return new[key][0] == old[key][0] and set(new[key]) >= set(old[key])
    if parts[0] == "answers" or (parts[0] == "arms" and parts[-1] in CHOICES):
        return set(new[key]) >= set(old[key])
    return False


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}\0")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
