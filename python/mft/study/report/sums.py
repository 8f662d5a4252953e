"""Sums per document of every tested run: table.json holds them, so that each interval can be computed again from it.

In a domain of table.json, under "sums":

    test         documents (their numbers in the split), tokens, questions (where any were asked): a number per document
                 runs: an entry per arm and seed: loss_sums (nats), correct (tokens), tempered_sums, answers (exact)
    texts        by name, the same of each general text, with kl_sums (nats)
    validation   the same of the runs that are compared at equal budgets, each with its setting

Nats are rounded to NATS_DECIMALS, as statistics.py rounds them before it computes anything.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from mft.evaluation.evaluate import Evaluation
from mft.study.arms.full import Base
from mft.study.arms.kinds import KINDS
from mft.study.outcome import Findings, General, Measured
from mft.study.report.equal_budgets import EqualBudget, outcome_within
from mft.study.report.statistics import DRAWS, NATS_DECIMALS, Difference, differences, paired

Run = dict[str, Any]


def sums_values(findings: Findings, domain: str, budgets: Iterable[EqualBudget]) -> dict[str, Any]:
    """What "sums" of one domain holds."""
    tested, texts = findings.test[domain], findings.study.general_of(domain)
    own = [({"arm": arm, "seed": seed}, one) for arm, runs in tested.items() for seed, one in runs.items()]
    values = {"test": _table(own)}
    if compared := _compared_at_budgets(findings, domain, budgets):
        values["validation"] = _table(compared)
    on_texts = findings.general.get(domain, {})
    for text in texts:
        runs = [
            ({"arm": arm, "seed": seed}, found[text])
            for arm, by_seed in on_texts.items()
            for seed, found in by_seed.items()
            if text in found
        ]
        if runs:
            values.setdefault("texts", {})[text] = _table(runs)
    return values


def runs_in(table: Mapping[str, Any], arm: str, text: str | None = None) -> dict[int, Measured | General]:
    """An arm's runs on test by seed, read from a domain of table.json; text: on that general text instead.

    The base model is one for all seeds.
    Raises: ValueError if the table holds no sums of this arm there.
    """
    sums = table.get("sums", {})
    held = sums.get("test") if text is None else sums.get("texts", {}).get(text)
    runs = [run for run in held["runs"] if run["arm"] == arm] if held else []
    if not runs:
        where = "test" if text is None else f"{text!r}"
        raise ValueError(
            f"the table must hold the sums per document of {arm!r} on {where}, got none: run mft compare again, which "
            "trains nothing that is done"
        )
    found = {run["seed"]: _measured(held, run, general=text is not None) for run in runs}
    kind = next(KINDS[row["kind"]] for row in table["rows"] if row["arm"] == arm)
    if len(found) == 1 and kind is Base:
        found = dict.fromkeys(sorted({run["seed"] for run in held["runs"]}), next(iter(found.values())))
    return found


def recomputed(
    table: Mapping[str, Any], arm: str, other: str, metric: str = "loss", *, text: str | None = None, draws: int = DRAWS
) -> Difference:
    """arm - other with its interval and p, from the sums in a domain of table.json.

    Args:
        metric: See statistics.paired.
        text: A general text in place of the domain's test split.
        draws: DRAWS for the tables; for "comparisons" what dominance.draws_of gives for their family.
    Raises: ValueError if the sums are not there, or the arms have no seed in common that was measured so.
    """
    pair = paired(runs_in(table, arm, text), runs_in(table, other, text), metric)
    if pair is None:
        raise ValueError(f"{arm!r} and {other!r} must have a seed in common that has {metric!r}, got none")
    return differences([pair], draws=draws)[0]


def recomputed_at_budget(table: Mapping[str, Any], compared: Mapping[str, Any]) -> Difference:
    """The difference of one entry of "equal_budgets", on validation with the first seed."""
    held = table["sums"]["validation"]

    def side(arm: str, setting: str) -> dict[int, Measured | General]:
        wanted = compared[arm], compared[setting]
        run = next(run for run in held["runs"] if (run["arm"], run["setting"]) == wanted)
        return {0: _measured(held, run, general=False)}

    pair = paired(side("arm", "setting"), side("control", "control_setting"))
    assert pair is not None, "both runs were measured"
    return differences([pair])[0]


# ---------------------------------------------------------------------------------------------- private


def _compared_at_budgets(
    findings: Findings, domain: str, budgets: Iterable[EqualBudget]
) -> list[tuple[Run, Measured | General]]:
    found: dict[str, tuple[Run, Measured | General]] = {}
    for one in budgets:
        for arm, setting in ((one.arm, one.setting), (one.control, one.control_setting)):
            if setting is None or one.difference is None:
                continue
            outcome = outcome_within(findings, domain, arm, setting)
            assert outcome.measured is not None, "it was compared"
            where = {"arm": arm, "seed": outcome.unit.seed, "setting": asdict(setting)}
            found[str(where)] = (where, outcome.measured)
    return list(found.values())


def _table(runs: Iterable[tuple[Run, Measured | General]]) -> dict[str, Any]:
    """What all runs share once, then an entry per run."""
    values: dict[str, Any] = {}
    entries: list[Run] = []
    for where, one in runs:
        evaluation, entry = one.evaluation, dict(where)
        values |= {"documents": _whole(evaluation.documents), "tokens": _whole(evaluation.tokens)}
        entry |= {"loss_sums": _nats(evaluation.loss_sums), "correct": _whole(evaluation.correct)}
        if isinstance(one, General):
            entry |= {} if one.kl is None else {"kl_sums": _nats(one.kl)}
        else:
            if one.tempered is not None:
                entry |= {"temperature": one.temperature, "tempered_sums": _nats(one.tempered.loss_sums)}
            if one.answers is not None and one.questions is not None:
                values["questions"], entry["answers"] = _whole(one.questions), _whole(one.answers)
        entries.append(entry)
    return values | {"runs": entries}


def _measured(held: Mapping[str, Any], run: Mapping[str, Any], *, general: bool) -> Measured | General:
    documents, tokens, correct = torch.tensor(held["documents"]), _doubles(held["tokens"]), _doubles(run["correct"])
    evaluation = Evaluation(documents, tokens, _doubles(run["loss_sums"]), correct)
    if general:
        return General(evaluation, _doubles(run["kl_sums"]) if "kl_sums" in run else None)
    tempered = None
    if "tempered_sums" in run:
        tempered = Evaluation(documents, tokens, _doubles(run["tempered_sums"]), correct)
    asked = "answers" in run
    return Measured(
        evaluation,
        tempered,
        run.get("temperature"),
        torch.tensor(run["answers"]) if asked else None,
        torch.tensor(held["questions"]) if asked else None,
    )


def _doubles(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _whole(values: Tensor) -> list[int]:
    return values.long().tolist()


def _nats(values: Tensor) -> list[float]:
    return values.double().numpy().round(NATS_DECIMALS).tolist()
