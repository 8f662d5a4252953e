"""What the runs of a regime show: sums per document, intervals of differences, and what could be shown at all.

Sums stay whole: nats of each document, with a hash of the tokens that were scored of it, so that an outsider can
compute every interval again.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from mft.evaluation.evaluate import evaluate
from mft.study.report.statistics import NATS_DECIMALS, Difference, Paired

ALPHA, POWER = 0.05, 0.8
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

    def paired(self, differences: Sequence[Mapping[str, Sequence[float]]]) -> Paired:
        """Of a difference in nats per document, by text, for each seed: every text counts as much as any other.

        Sums and counts of a text are divided by its tokens, so the estimate is the mean over texts of nats per token.
        """
        texts = list(differences[0])
        counts = [np.array(self.tokens[text], float) for text in texts]
        shares = np.concatenate([count / count.sum() for count in counts])
        sums = [
            np.concatenate([np.array(one[text]) / count.sum() for text, count in zip(texts, counts)])
            for one in differences
        ]
        scored = shares > 0
        return Paired(np.stack(sums)[:, scored], shares[scored])

    def mean_loss(self, nats: Mapping[str, Sequence[float]]) -> float:
        """The mean over texts of nats per token."""
        return float(np.mean([sum(own) / sum(self.tokens[text]) for text, own in nats.items()]))


def nats_of(model: nn.Module, dataset: Any) -> list[float]:
    """Of each document, in order of number, rounded as every interval takes them."""
    return evaluate(model, dataset, batch_size=ROWS).loss_sums.double().numpy().round(NATS_DECIMALS).tolist()


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


def interval(difference: Difference) -> str:
    """ "-0.123 [-0.2, -0.1]", and * where p stays below 0.05 after Holm's correction."""
    p = difference.p if difference.p_holm is None else difference.p_holm
    star = " *" if p < ALPHA else ""
    return f"{difference.estimate:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]{star}"


def _hashes(dataset: Any) -> list[str]:
    """Of each document, in order of number: of the tokens that are scored."""
    found: dict[int, Any] = {}
    for row in dataset.with_format("numpy"):
        found.setdefault(int(row["document"]), hashlib.sha256()).update(row["labels"][row["labels"] >= 0].tobytes())
    return [found[number].hexdigest()[:16] for number in sorted(found)]
