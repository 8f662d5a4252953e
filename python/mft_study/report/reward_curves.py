"""Curves of runs by rewards over their steps: the rewards of their samples, and the exact answers on validation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mft.files.figure import new_figure, save_figure
from mft_study.config import REWARDS
from mft_study.outcome import Findings
from mft_study.report.pictures.plots import colours_of
from mft_study.report.statistics import mean

REWARDS_PLOT = "rewards.png"
_WINDOW = 20  # the rewards shown are means over this many steps


def reward_curves(findings: Findings, domain: str) -> list[dict[str, Any]]:
    """Return each chosen run by rewards: arm, seed, steps, rewards per step, and answers as [steps, share exact]."""
    chosen = findings.chosen.get(domain, {})
    return [
        {
            "arm": outcome.unit.arm,
            "seed": outcome.unit.seed,
            "steps": outcome.steps,
            "rewards": outcome.rewards,
            "answers": [[share * outcome.steps, exact] for share, exact in outcome.answers_curve],
        }
        for outcome in findings.outcomes
        if outcome.unit.domain == domain
        and outcome.rewards
        and not outcome.unit.part
        and outcome.unit.setting == chosen.get(outcome.unit.arm)
    ]


def plot_rewards(numbers: Mapping[str, Any], path: Path) -> None:
    """Plot exact answers on validation, and rewards, by step: a row per domain, each arm's mean over seeds.

    Raises: ValueError if no domain has a run by rewards.
    """
    domains = {name: table for name, table in numbers["domains"].items() if table.get("by_rewards")}
    if not domains:
        raise ValueError("a plot of rewards must have a run by rewards, got none: set objective=rewards in the study")
    figure = new_figure(12.5, 4.2 * len(domains))
    for (left, right), (domain, table) in zip(figure.subplots(len(domains), 2, squeeze=False), domains.items()):
        arms = list(dict.fromkeys(run["arm"] for run in table["by_rewards"]))
        colours, ends = colours_of(table), dict[str, float]()
        for arm in arms:
            colour, runs = colours[arm], [run for run in table["by_rewards"] if run["arm"] == arm]
            places = [step for step, _ in runs[0]["answers"]]
            means = [mean(100 * run["answers"][i][1] for run in runs) for i in range(len(places))]
            ends[arm] = means[-1]
            left.plot(places, means, "o-", color=colour, label=arm, markersize=4)
            rewards = [mean(step) for step in zip(*(run["rewards"] for run in runs))]
            shown = [mean(rewards[max(0, i - _WINDOW + 1) : i + 1]) for i in range(len(rewards))]
            right.plot(range(1, len(shown) + 1), shown, color=colour, label=arm)
        start = next((row for row in table["rows"] if row["arm"] == table["full"]), None)
        if start is not None and start.get("validation_exact") is not None:
            left.axhline(
                100 * start["validation_exact"], color="0.25", linestyle="--", linewidth=1, label=table["full"]
            )
        best, answered = max(ends.items(), key=lambda end: end[1])
        left.set_title(f"{domain}: {best} answers most questions at the end, {answered:.0f} %", loc="left")
        right.set_title("What the arms were rewarded while they learned", loc="left")
        left.set_ylabel("right answers on validation, % (higher is better)")
        right.set_ylabel(f"reward, mean of {_WINDOW} steps (higher is better)")
        for axes in (left, right):
            axes.set_xlabel("steps")
            axes.legend(frameon=False, fontsize=8)
    save_figure(figure, path, dpi=100)


def rewards_remark(findings: Findings) -> str:
    """Return how the arms were trained, and by what they were chosen and judged."""
    study = findings.study
    assert study.objective == REWARDS, "asked for of such studies"
    config = study.rewards
    trained = [(name, arm) for name, arm in study.arms.items() if arm.learns]
    taught = ", ".join(f"{name} by {arm.teacher}" for name, arm in trained if arm.teacher is not None)
    lesson = f"at each token of its own answers what the teacher would say ({config.divergence}), not by rewards"
    others = ""
    if all(arm.teacher is not None for _, arm in trained):
        how = f"{lesson}: {taught}"
    else:
        rule = f"1 for a right answer ({config.verifier}) and 0 for a wrong one"
        how = f"by rewards, {rule}: GRPO by TRL, loss {config.loss_type}, beta {config.beta:g}"
        others = f" But {taught} learned {lesson}." if taught else ""
    asked = ""
    if study.questions:
        asked = f" On {', '.join(study.questions)} these are other questions than in the fine-tune."
    return (
        f"Every trained arm after the fine-tune learned {how}; {config.questions} questions per step, "
        f"{config.num_generations} answers to each of at most {config.max_completion_tokens} tokens; an epoch asks "
        f"as many questions as the data has.{asked} Validation chooses by exact answers, then by loss, and chooses "
        f"checkpoints likewise ({study.checkpoints} per run); verdicts, p and validation - control are of wrong "
        f"answers a question.{others}"
    )
