"""Decide what a study runs next from what it has found so far. Nothing here trains, reads or writes.

An arm runs its grid with the first seed, then its chosen setting with every seed. It first waits for the arms that it
needs: the arm at whose end it starts (usually the full fine-tune), the arm that it is made of, and its teacher. When
all arms are done, those that lead on validation run with more seeds if study.leaders is set. Test comes last.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from mft_study.arms.full import Full
from mft_study.arms.means import Average
from mft_study.arms.setting import Setting
from mft_study.config import LEAST_RATES, REWARDS, StudyConfig
from mft_study.grid import DIRECTIONS, Neighbour, OpenEnd, neighbours
from mft_study.leaders import leading_arms
from mft_study.outcome import Outcome, Unit

Chosen = dict[str, dict[str, Setting]]  # by domain and arm

_WHOLE_MODEL = 1.7  # per token, training all layers takes 1.7 times as long as half of them (small study)
_ANSWERED = 3  # per token, answering a question once and learning from it takes 3 times as long as text
_NOTHING = 1e-3  # nats per token: LoRA at vanishing rates ended 0.0002 from its start (once, small.yaml's problems)
_MORE = 3  # extensions to ask for: one step of epochs and the two rates next to it


def ready(study: StudyConfig, done: Iterable[Outcome]) -> list[Unit]:
    """Return the units that can run now, grouped by the arm that they start from; none when all is trained.

    Raises: RuntimeError if no setting of the full fine-tune, where other arms start, gave a result.
    """
    found = _Found(study, done)
    units: list[Unit] = []
    for domain in study.domains:
        if why := found.why_none(domain, str(study.first_of_kind(Full))):
            raise RuntimeError(why)
        waiting = [
            unit
            for arm in study.arms
            if not found.why_none(domain, arm) and not any(found.next_of(domain, needed) for needed in study.needs(arm))
            for unit in found.next_of(domain, arm)
        ]
        units += sorted(waiting, key=lambda unit: (study.start_of(unit.arm) or "", study.all_seeds.index(unit.seed)))
    return units


def chosen_settings(study: StudyConfig, outcomes: Iterable[Outcome]) -> Chosen:
    """Return what validation chose with the first seed, for arms whose grid is done.

    It is the setting of the lowest loss among those that no seed made diverge.
    """
    found = _Found(study, outcomes)
    chosen: Chosen = {domain: {} for domain in study.domains}
    for domain in study.domains:
        for arm in study.arms:
            source = study.chooser(arm)
            best = found.best(domain, source)
            if best is not None and not found.unexplored(domain, source) and not found.why_none(domain, arm):
                chosen[domain][arm] = best
    return chosen


def why_no_setting(study: StudyConfig, outcomes: Iterable[Outcome]) -> dict[str, dict[str, str]]:
    """Return why arms have no setting that can be chosen, by domain and arm. The study goes on without them."""
    found = _Found(study, outcomes)
    why = {domain: {arm: found.why_none(domain, arm) for arm in study.arms} for domain in study.domains}
    return {domain: {arm: words for arm, words in arms.items() if words} for domain, arms in why.items()}


def units_declared(study: StudyConfig) -> dict[str, int]:
    """Return how many units each arm takes per domain: every setting with the first seed, the best with the others."""
    units = {}
    for name, arm in study.arms.items():
        others = len(study.seeds_of(name)) - 1
        units[name] = len(set(arm.settings(study.mask))) + others
        if isinstance(arm, Average):
            units[name] = arm.runs * (1 + others)  # the mean, and runs - 1 runs of its own
    return units


def best_so_far(study: StudyConfig, outcomes: Iterable[Outcome]) -> dict[tuple[str, str], Setting]:
    """Return, by (domain, arm), the setting that would be chosen if no other were tried."""
    found = _Found(study, outcomes)
    best = {(domain, arm): found.best(domain, study.chooser(arm)) for domain in study.domains for arm in study.arms}
    return {place: setting for place, setting in best.items() if setting is not None}


def chosen_units(study: StudyConfig, outcomes: Iterable[Outcome]) -> list[Unit]:
    """Return the units that test will see, for every domain, arm and seed. Call it when ready() is empty."""
    outcomes = list(outcomes)
    chosen, found = chosen_settings(study, outcomes), _Found(study, outcomes)
    return [
        Unit(domain, arm, seed, chosen[domain][arm])
        for domain in study.domains
        for seed in study.all_seeds
        for arm in study.arms
        if seed in found.seeds_of(domain, arm) and arm in chosen[domain]
    ]


def start_of(study: StudyConfig, chosen: Chosen, unit: Unit) -> Unit | None:
    """Return the run at whose end a unit starts; None if it starts at the base model."""
    arm = study.start_of(unit.arm)
    return None if arm is None else Unit(unit.domain, arm, unit.seed, chosen[unit.domain][arm])


def starts_of(study: StudyConfig, chosen: Chosen, unit: Unit) -> list[Unit]:
    """Return the runs that lead from the base model to the start of a unit, in order."""
    before = start_of(study, chosen, unit)
    return [] if before is None else [*starts_of(study, chosen, before), before]


def teachers_of(study: StudyConfig, chosen: Chosen, unit: Unit) -> list[Unit] | None:
    """Return the runs that lead from the base model to a unit's teacher, in order; None if it has no teacher."""
    teacher = study.arms[unit.arm if not unit.part else str(study.arms[unit.arm].of)].teacher
    if teacher is None:
        return None
    if study.is_base(teacher):
        return []
    last = Unit(unit.domain, teacher, unit.seed, chosen[unit.domain][teacher])
    return [*starts_of(study, chosen, last), last]


def source_of(study: StudyConfig, chosen: Chosen, unit: Unit) -> Unit | None:
    """Return the run that a unit is made of; None unless its arm is derived and has settings of its own."""
    config = study.arms[unit.arm]
    if config.of is None or isinstance(config, Average):
        return None
    return Unit(unit.domain, config.of, unit.seed, chosen[unit.domain][config.of])


def parts_of(study: StudyConfig, unit: Unit) -> list[Unit]:
    """Return the runs that an average is the mean of: the source arm's own, then those in other orders of the data."""
    config = study.arms[unit.arm]
    if not isinstance(config, Average) or unit.part:
        return []
    return [replace(unit, arm=str(config.of)), *(replace(unit, part=part) for part in range(1, config.runs))]


def work_left(study: StudyConfig, outcomes: Iterable[Outcome], tested: Iterable[Unit]) -> tuple[int, float]:
    """Return how many units and test evaluations are left, as far as known, and their work (see work_of).

    If nothing is chosen for an arm, the middle of its grid stands in.
    """
    found, seen, number, work = _Found(study, outcomes), list(tested), 0, 0.0
    for domain in study.domains:
        tests = -sum(unit.domain == domain for unit in seen)
        for arm, config in study.arms.items():
            if found.why_none(domain, arm):
                continue
            source = study.chooser(arm)
            grid = study.arms[source].settings(study.mask)
            likely = found.best(domain, source) or grid[len(grid) // 2]
            seeds = found.seeds_of(domain, arm)
            units = [Unit(domain, arm, seed, likely) for seed in seeds]
            if isinstance(config, Average):
                units += [part for unit in units for part in parts_of(study, unit)[1:]]
            elif untried := found.unexplored(domain, arm):
                units = [*units[1:], *(Unit(domain, arm, seeds[0], setting) for setting in untried)]
            left = [unit for unit in units if unit not in found.by_unit]
            tests, number = tests + len(seeds), number + len(left)
            work += sum(work_of(study, unit) for unit in left)
        number, work = number + tests, work + tests * _work_on_test(study, domain)
    return number, work


def work_of(study: StudyConfig, unit: Unit, *, on_test: bool = False) -> float:
    """Estimate the work of a unit, in evaluated tokens. The remaining time is estimated from it."""
    config, data = study.arms[unit.arm], study.domains[unit.domain]
    if on_test:
        return _work_on_test(study, unit.domain)
    trained, learned = unit.setting.epochs or 0, data
    if config.follows:
        learned = study.questions.get(unit.domain, data)
    if isinstance(config, Average) and not unit.part:
        trained = 0
    if study.objective == REWARDS and config.follows:
        trained *= _ANSWERED * study.rewards.num_generations
    elif config.whole_model:
        trained *= _WHOLE_MODEL
    evaluated = (data.max_eval_tokens or 1) + _work_on_general(study, unit.domain)
    return trained * (learned.max_train_tokens or 1) + evaluated


def notes(study: StudyConfig, outcomes: Iterable[Outcome]) -> list[str]:
    """Return what a reader of the choices must know: diverged runs, grids with few rates, arms that gain nothing."""
    outcomes = list(outcomes)
    found, lines = _Found(study, outcomes), []
    for outcome in sorted_outcomes(study, outcomes):
        if outcome.diverged is not None and not found.why_none(outcome.unit.domain, outcome.unit.arm):
            lines.append(f"{outcome.unit}: {outcome.diverged}")
    for domain in study.domains:
        for arm, config in study.arms.items():
            if not config.lrs or found.best(domain, arm) is None:
                continue
            rates = {setting.lr for setting in found.losses(domain, arm)}
            if len(rates) < LEAST_RATES:
                lines.append(
                    f"{domain}, {arm}: only {len(rates)} rate(s) tried, at least {LEAST_RATES} make a fair choice"
                )
            if closed := [one for one in found.untried(domain, arm) if found.leads_back(domain, arm, one)]:
                ways = " and ".join(DIRECTIONS[one.name] for one in closed)
                lines.append(
                    f"{domain}, {arm}: its best setting is within {_NOTHING:g} nats per token of its starting point, "
                    f"and the {ways} beyond its grid would only lead back to it: they were not tried"
                )
    return lines


def open_ends(study: StudyConfig, outcomes: Iterable[Outcome]) -> list[OpenEnd]:
    """Return the arms whose best setting still lies at an end of the grid, because no more settings may be tried."""
    found, ends = _Found(study, outcomes), []
    for domain in study.domains:
        for arm in study.arms:
            best = found.best(domain, arm)
            for one in [] if best is None else found.growth(domain, arm):
                remedies = [f"extensions={study.extensions + _MORE}"] if found.is_spent(domain, arm) else []
                if one.name == "epochs" and one.value > study.max_epochs:
                    remedies.append(f"max_epochs={one.value:g}")
                value, remedy = getattr(best, one.name), " ".join(remedies)
                ends.append(OpenEnd(domain, arm, DIRECTIONS[one.name], value, one.above, remedy))
    return ends


def sorted_outcomes(study: StudyConfig, outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Return the outcomes in the order of the declaration, whatever order they ran in."""
    domains, arms = list(study.domains), list(study.arms)

    def place(outcome: Outcome) -> tuple:
        unit = outcome.unit
        where = (domains.index(unit.domain), arms.index(unit.arm), study.all_seeds.index(unit.seed))
        return (*where, _order(unit.setting), unit.part)

    return sorted(outcomes, key=place)


# ---------------------------------------------------------------------------------------------- private


def _work_on_test(study: StudyConfig, domain: str) -> float:
    both = 2 * (study.domains[domain].max_eval_tokens or 1)  # validation again, and test
    return both + 3 * _work_on_general(study, domain)  # also the KL divergence, which runs two models


def _work_on_general(study: StudyConfig, domain: str) -> float:
    return sum(study.general[name].max_eval_tokens or 1 for name in study.general_of(domain))


class _Found:
    """Outcomes by unit, and what follows from them."""

    def __init__(self, study: StudyConfig, outcomes: Iterable[Outcome]) -> None:
        self.study = study
        self.by_unit = {outcome.unit: outcome for outcome in outcomes}
        self._first: dict[tuple[str, str], list[Outcome]] = {}  # with the first seed, by domain and arm
        self._grids = {name: dict.fromkeys(arm.settings(study.mask)) for name, arm in study.arms.items()}
        self._losses: dict[tuple[str, str], dict[Setting, float]] = {}
        self._leading: dict[str, set[str]] = {}
        self._next: dict[tuple[Any, ...], list[Unit]] = {}  # by domain, arm and seeds
        for unit, outcome in self.by_unit.items():
            if (unit.seed, unit.part) == (study.seeds[0], 0):
                self._first.setdefault((unit.domain, unit.arm), []).append(outcome)
        source = {name: study.chooser(name) for name in study.arms}
        self.diverged = {
            (unit.domain, source[unit.arm], unit.setting)
            for unit, outcome in self.by_unit.items()
            if outcome.measured is None and not self._is_mean(outcome)
        }
        # Why an average failed although all of its runs finished.
        self._not_averaged = {
            (unit.domain, unit.arm): outcome.diverged or ""
            for unit, outcome in self.by_unit.items()
            if outcome.measured is None and self._is_mean(outcome)
        }

    def _is_mean(self, outcome: Outcome) -> bool:
        return isinstance(self.study.arms[outcome.unit.arm], Average) and not outcome.unit.part

    def losses(self, domain: str, arm: str) -> dict[Setting, float]:
        """Return Measured.choice of each setting tried with the first seed; infinite if it may not be chosen."""
        if (domain, arm) not in self._losses:
            losses = {
                outcome.unit.setting: math.inf if self._does_not_count(outcome) else outcome.choice
                for outcome in self._first.get((domain, arm), ())
            }
            self._losses[domain, arm] = dict(sorted(losses.items(), key=lambda item: _order(item[0])))
        return self._losses[domain, arm]

    def _does_not_count(self, outcome: Outcome) -> bool:
        """Return whether any seed or part diverged in the outcome's setting, or the outcome stores too much."""
        unit = outcome.unit
        most = self.study.arms[unit.arm].max_bytes
        too_large = most is not None and outcome.bytes is not None and outcome.bytes > most
        return too_large or (unit.domain, unit.arm, unit.setting) in self.diverged

    def best(self, domain: str, arm: str) -> Setting | None:
        losses = self.losses(domain, arm)
        best = min(losses, key=losses.__getitem__, default=None)
        return None if best is None or math.isinf(losses[best]) else best

    def unexplored(self, domain: str, arm: str) -> list[Setting]:
        """Return the grid's untried settings; if none is left, one neighbour of the best if the best is at an end."""
        losses = self.losses(domain, arm)
        waiting = [setting for setting in self._grids[arm] if setting not in losses]
        if waiting or self.is_spent(domain, arm) or self._fails(domain, arm):
            return waiting
        most = self.study.max_epochs
        further = (one for one in self.growth(domain, arm) if one.name != "epochs" or one.value <= most)
        return [one.setting for one in further][:1]

    def is_spent(self, domain: str, arm: str) -> bool:
        """Return whether an arm has tried as many settings beyond its declared grid as it may."""
        return len(self.losses(domain, arm).keys() - self._grids[arm].keys()) >= self.study.extensions

    def growth(self, domain: str, arm: str) -> list[Neighbour]:
        """Return the neighbours of the best setting that must be tried before it lies inside the grid."""
        return [one for one in self.untried(domain, arm) if not self.leads_back(domain, arm, one)]

    def untried(self, domain: str, arm: str) -> list[Neighbour]:
        """Return all untried neighbours of the best setting, or of the first setting if every one diverged."""
        losses = self.losses(domain, arm)
        return neighbours(min(losses, key=losses.__getitem__), self._grids[arm], losses) if losses else []

    def leads_back(self, domain: str, arm: str, one: Neighbour) -> bool:
        """Return whether this neighbour only leads back to the arm's start, over which its best setting gains nothing.

        If the arm does harm at its rates, lower ones are still tried.
        """
        start, fades = self._begins(arm), self.study.arms[arm].fades
        less = one.above if one.name == "keep_ratio" else fades and not one.above
        if not less or start is None:
            return False
        before, best = (min(self.losses(domain, each).values(), default=math.inf) for each in (start, arm))
        harms = one.name != "keep_ratio" and best - before >= _NOTHING
        return math.isfinite(best) and before - best < _NOTHING and not harms

    def _begins(self, arm: str) -> str | None:
        """Return the arm that equals this one before training: its start, or for trained scales the untrained arm."""
        arms = self.study.arms
        if arms[arm].of is None:
            return self.study.start_of(arm)
        alike = (name for name, one in arms.items() if (type(one), one.of) == (type(arms[arm]), arms[arm].of))
        return next((name for name in alike if not arms[name].lrs), None)

    def next_of(self, domain: str, arm: str) -> list[Unit]:
        """Return the arm's units that are not done, as far as known, whatever they wait for."""
        waiting = self._next_with(domain, arm, self.study.seeds_of(arm))
        return waiting or self._next_with(domain, arm, self.seeds_of(domain, arm))

    def seeds_of(self, domain: str, arm: str) -> list[int]:
        """Return the seeds that an arm runs with. Once the leaders are known, they also get the further seeds."""
        leads = not self.study.is_base(arm) and arm in self._leading_of(domain)
        return self.study.all_seeds if leads else self.study.seeds_of(arm)

    def _leading_of(self, domain: str) -> set[str]:
        """Return the arms that lead; an empty set until all arms have run with the study's own seeds."""
        study = self.study
        if study.leaders is None or domain in self._leading:
            return self._leading.get(domain, set())
        self._leading[domain] = set()
        if any(self._next_with(domain, arm, study.seeds_of(arm)) for arm in study.arms):
            return set()
        runs = {}
        for arm in study.arms:
            setting = self.best(domain, study.chooser(arm))
            if setting is None or self.why_none(domain, arm):
                continue
            runs[arm] = [self.by_unit[Unit(domain, arm, seed, setting)] for seed in study.seeds_of(arm)]
        self._leading[domain] = leading_arms(study, study.leaders, runs)
        return self._leading[domain]

    def _next_with(self, domain: str, arm: str, seeds: list[int]) -> list[Unit]:
        place = (domain, arm, *seeds)
        if place not in self._next:
            self._next[place] = self._find_next(domain, arm, seeds)
        return self._next[place]

    def _find_next(self, domain: str, arm: str, seeds: list[int]) -> list[Unit]:
        if isinstance(self.study.arms[arm], Average):
            return self._next_of_average(domain, arm, seeds)
        waiting = self.unexplored(domain, arm)
        if waiting:
            return [Unit(domain, arm, self.study.seeds[0], setting) for setting in waiting]
        best = self.best(domain, arm)
        units = [] if best is None else [Unit(domain, arm, seed, best) for seed in seeds]
        return [unit for unit in units if unit not in self.by_unit]

    def why_none(self, domain: str, arm: str) -> str:
        """Return why no setting of the arm can be chosen, whatever still runs; "" if one can, or may later."""
        for needed in self.study.needs(arm):
            if self.why_none(domain, needed):
                return f"{domain}, {arm} must have what it needs, {needed}, which has no result"
        if (domain, arm) in self._not_averaged:
            return f"{domain}, {arm}: {self._not_averaged[domain, arm]}"
        source = self.study.chooser(arm)
        if not self.losses(domain, source) or self.best(domain, source) or self.unexplored(domain, source):
            return ""
        return self._why_none(domain, source)

    def _fails(self, domain: str, arm: str) -> bool:
        """Return whether the arm's method failed in every setting, so that other rates would fail too."""
        first = self._first.get((domain, arm), ())
        return bool(first) and all(outcome.fails for outcome in first)

    def _why_none(self, domain: str, arm: str) -> str:
        finite = [outcome for outcome in self._first[domain, arm] if outcome.measured is not None]
        most = self.study.arms[arm].max_bytes
        least = min(finite, key=lambda one: (one.bytes or 0, _order(one.unit.setting)), default=None)
        if most is not None and least is not None and (least.bytes or 0) > most:
            return (
                f"{domain}, {arm} must have a setting that stores at most arms.{arm}.max_bytes = {most} bytes, the "
                f"smallest ({least.unit.setting}) stores {least.bytes}: add smaller ones to its grid, or raise it"
            )
        if self._fails(domain, arm):
            return f"{domain}, {arm}: {self._first[domain, arm][0].diverged}"
        tried = "; ".join(str(setting) for setting in self.losses(domain, arm))
        return (
            f"{domain}, {arm} must stay finite in one of its settings, it diverged in each ({tried}): "
            f"add lower rates to arms.{arm}.lrs"
        )

    def _next_of_average(self, domain: str, arm: str, seeds: list[int]) -> list[Unit]:
        config = self.study.arms[arm]
        setting = self.best(domain, str(config.of))
        if self._next_with(domain, str(config.of), seeds) or setting is None:
            return []
        units = []
        for seed in seeds:
            whole = Unit(domain, arm, seed, setting)
            missing = [part for part in parts_of(self.study, whole) if part not in self.by_unit]
            units += missing or [unit for unit in [whole] if unit not in self.by_unit]
        return units


def _order(setting: Setting) -> tuple[Any, ...]:
    return tuple(value or 0.0 for value in vars(setting).values())
