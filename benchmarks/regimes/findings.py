"""What the runs of a regime show: sums per document, intervals of differences, and what could be shown at all.

Sums stay whole: nats of each document, with a hash of the tokens that were scored of it, so that an outsider can
compute every interval again.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from mft.evaluation.evaluate import evaluate
from mft.study.report.statistics import NATS_DECIMALS, Paired, differences, with_holm

ALPHA, POWER = 0.05, 0.8
Nats = Mapping[str, Sequence[float]]  # by text, of each document
SPREADS = ("over_seeds", "over_documents")  # standard deviations
ROWS = 8  # that are evaluated together
_DRAWS = 200_000  # of Student's t: its quantiles to about 1 %
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Documents:
    """Of several texts, the documents that were scored: a hash and a number of tokens each."""

    hashes: dict[str, list[str]]
    tokens: dict[str, list[int]]

    @classmethod
    def of(cls, model: nn.Module, texts: Mapping[str, Any]) -> "Documents":
        """Of datasets by text, with columns input_ids, labels and document; model says how many tokens it predicts."""
        hashes = {text: _hashes(dataset) for text, dataset in texts.items()}
        tokens = {
            text: evaluate(model, dataset, batch_size=ROWS).tokens.int().tolist() for text, dataset in texts.items()
        }
        return cls(hashes, tokens)

    @property
    def number(self) -> int:
        return sum(map(len, self.tokens.values()))

    def paired(self, changes: Sequence[Nats]) -> Paired:
        """Of a difference in nats per document, by text, for each seed: every text counts as much as any other.

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
        """The mean over texts of nats per token."""
        return float(np.mean([sum(own) / sum(self.tokens[text]) for text, own in nats.items()]))


def nats_of(model: nn.Module, dataset: Any) -> list[float]:
    """Of each document, in order of number, rounded as every interval takes them."""
    return evaluate(model, dataset, batch_size=ROWS).loss_sums.double().numpy().round(NATS_DECIMALS).tolist()


def minus(nats: Nats, others: Nats) -> dict[str, list[float]]:
    """By text, of each document."""
    return {text: (np.array(own) - np.array(others[text])).tolist() for text, own in nats.items()}


def compared(nats: Mapping[str, Mapping[int, Nats]], reference: str, documents: Documents) -> dict[str, dict[str, Any]]:
    """Every other arm less the reference, in the seeds that both have: a Difference, adjusted for how many there are.

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


def smallest_difference(over_seeds: float, over_documents: float, seeds: int, documents: int) -> float:
    """What is shown with the chance POWER at the level ALPHA, in the unit of the two standard deviations.

    (t_v(1 - ALPHA / 2) + t_v(POWER)) sqrt(V_S + V_D) with V_S = over_seeds^2 / S, V_D = over_documents^2 / D, and
    Satterthwaite's v, as the intervals have it; infinite for one seed.
    """
    if seeds < 2 or documents < 2:
        return math.inf
    of_seeds, of_documents = over_seeds**2 / seeds, over_documents**2 / documents
    total = of_seeds + of_documents
    freedom = total**2 / (of_seeds**2 / (seeds - 1) + of_documents**2 / (documents - 1))
    drawn = np.random.default_rng(0).standard_t(freedom, _DRAWS)
    return float(np.quantile(drawn, (1 - ALPHA / 2, POWER)).sum() * math.sqrt(total))


def spreads(pair: Paired) -> tuple[float, float]:
    """The standard deviations of a difference over seeds and over documents, nats per token."""
    total, (seeds, documents) = pair.counts.sum(), pair.sums.shape
    by_seed = pair.sums.sum(-1) / total
    residuals = (pair.sums - by_seed[:, None] * pair.counts).mean(0)
    over_documents = math.sqrt((residuals**2).sum() * documents**2 / (documents - 1)) / total
    return float(by_seed.std(ddof=1)) if seeds > 1 else 0.0, float(over_documents)


def power_line(seeds: int, documents: int, over_seeds: float, over_documents: float, source: str) -> str:
    """Said before a regime begins."""
    least = smallest_difference(over_seeds, over_documents, seeds, documents)
    return (
        f"{seeds} seeds and {documents} test documents can show a difference of {least:.3f} nats per token "
        f"(p < {ALPHA}, power {POWER}, one comparison; more comparisons need more), if differences vary by "
        f"{over_seeds:.3f} over seeds and {over_documents:.3f} over documents, {source}"
    )


def interval(compared: Mapping[str, Any] | None) -> str:
    """ "-0.123 [-0.200, -0.100]", and * where p stays below 0.05 after Holm's correction; "" for no comparison."""
    if compared is None:
        return ""
    star = " *" if (compared["p"] if compared["p_holm"] is None else compared["p_holm"]) < ALPHA else ""
    return f"{compared['estimate']:+.3f} [{compared['low']:+.3f}, {compared['high']:+.3f}]{star}"


def _hashes(dataset: Any) -> list[str]:
    """Of each document, in order of number: of the tokens that are scored."""
    found: dict[int, Any] = {}
    for row in dataset.with_format("numpy"):
        found.setdefault(int(row["document"]), hashlib.sha256()).update(row["labels"][row["labels"] >= 0].tobytes())
    return [found[number].hexdigest()[:16] for number in sorted(found)]
