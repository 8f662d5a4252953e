"""What the runs of a regime show: sums per document, intervals of differences, and the smallest detectable effect.

Sums are stored completely: nats of each document with a hash of its scored tokens, so that an outsider can compute
every interval again.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import nn

from mft.evaluation.evaluate import evaluate
from mft_study.evidence.power import ALPHA, POWER, Spread, smallest_difference, squared_errors
from mft_study.evidence.sums import NATS_DECIMALS, document_hashes
from mft_study.report.statistics import Paired, differences, with_holm

Nats = Mapping[str, Sequence[float]]  # by text, for each document
SPREADS = ("over_seeds", "over_documents")  # standard deviations
ROWS = 8  # evaluated together


@dataclass(frozen=True)
class Documents:
    """The scored documents of several texts: a hash and a number of tokens each."""

    hashes: dict[str, list[int]]
    tokens: dict[str, list[int]]

    @classmethod
    def of(cls, model: nn.Module, texts: Mapping[str, Any]) -> "Documents":
        """Return documents of datasets by text (columns input_ids, labels, document); model counts predicted tokens."""
        found = {text: document_hashes(dataset) for text, dataset in texts.items()}
        hashes = {text: [own[number] for number in sorted(own)] for text, own in found.items()}
        tokens = {
            text: evaluate(model, dataset, batch_size=ROWS).tokens.int().tolist() for text, dataset in texts.items()
        }
        return cls(hashes, tokens)

    @property
    def number(self) -> int:
        return sum(map(len, self.tokens.values()))

    def paired(self, changes: Sequence[Nats]) -> Paired:
        """Pair differences in nats per document, by text, for each seed. Every text has the same weight.

        Sums and counts of a text are divided by its tokens, so the estimate is the mean over texts of nats per token.
        """
        texts = list(changes[0])
        counts = [np.array(self.tokens[text], float) for text in texts]
        shares = np.concatenate([count / count.sum() for count in counts])
        sums = [
            np.concatenate([np.array(one[text]) / count.sum() for text, count in zip(texts, counts)]) for one in changes
        ]
        scored = shares > 0
        return Paired(np.stack(sums)[:, scored], shares[scored])

    def mean_loss(self, nats: Nats) -> float:
        """Return the mean over texts of nats per token."""
        return float(np.mean([sum(own) / sum(self.tokens[text]) for text, own in nats.items()]))


def nats_of(model: nn.Module, dataset: Any) -> list[float]:
    """Return the loss of each document in nats, in order of number, rounded as for every interval."""
    return evaluate(model, dataset, batch_size=ROWS).loss_sums.double().numpy().round(NATS_DECIMALS).tolist()


def minus(nats: Nats, others: Nats) -> dict[str, list[float]]:
    """Return the differences by text, for each document."""
    return {text: (np.array(own) - np.array(others[text])).tolist() for text, own in nats.items()}


def compared(nats: Mapping[str, Mapping[int, Nats]], reference: str, documents: Documents) -> dict[str, dict[str, Any]]:
    """Compare every other arm with the reference, in the seeds that both have: a Difference, adjusted for their number.

    Args: nats: by arm and seed.
    Returns: by arm the fields of the difference, and how it varies over seeds and documents.
    """
    pairs = {}
    for arm, runs in nats.items():
        both = [minus(own, nats[reference][seed]) for seed, own in runs.items() if seed in nats[reference]]
        if arm != reference and both:
            pairs[arm] = documents.paired(both)
    found = zip(pairs, with_holm(differences(list(pairs.values()))), pairs.values())
    return {arm: asdict(one) | dict(zip(SPREADS, spreads(pair))) for arm, one, pair in found}


def spreads(pair: Paired) -> tuple[float, float]:
    """Return the standard deviations of a difference over seeds and over documents, nats per token."""
    seeds, documents = pair.sums.shape
    by_seed = pair.sums.sum(-1) / pair.counts.sum()
    residuals = (pair.sums - by_seed[:, None] * pair.counts).mean(0)
    errors = squared_errors((by_seed - by_seed.mean())[None], residuals[None], pair.counts[None])
    over_seeds, over_documents = (float(error[0]) for error in errors)
    return math.sqrt(over_seeds * seeds), math.sqrt(over_documents * documents)


def power_line(seeds: int, documents: int, spread: Spread) -> str:
    """Return the smallest difference that can be shown, in words; printed before a regime begins."""
    least = smallest_difference(spread, seeds, documents)
    return (
        f"{seeds} seeds and {documents} test documents can show a difference of {least:.3f} nats per token "
        f"(p < {ALPHA}, power {POWER}, one comparison; more comparisons need more), if differences vary by "
        f"{spread.seeds:.3f} over seeds and {spread.documents:.3f} over documents, as for {spread.source}"
    )


def interval(compared: Mapping[str, Any] | None) -> str:
    """ "-0.123 [-0.200, -0.100]", and * if p < 0.05 after Holm's correction; "" if there is no comparison."""
    if compared is None:
        return ""
    star = " *" if (compared["p"] if compared["p_holm"] is None else compared["p_holm"]) < ALPHA else ""
    return f"{compared['estimate']:+.3f} [{compared['low']:+.3f}, {compared['high']:+.3f}]{star}"
