"""What the runs of a regime show: sums per document, and intervals of differences.

Sums are stored completely: nats of each document with a hash of its scored tokens, so that an outsider can compute
every interval again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import nn

from mft.evaluation.evaluate import evaluate
from mft_study.evidence.power import ALPHA, deviations
from mft_study.evidence.sums import NATS_DECIMALS, document_hashes
from mft_study.report.statistics import Paired, adjust_holm, differences

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


def compare_arms(
    nats: Mapping[str, Mapping[int, Nats]], reference: str, documents: Documents
) -> dict[str, dict[str, Any]]:
    """Compare every other arm with the reference, in the seeds that both have: a Difference, adjusted for their number.

    Args: nats: by arm and seed.
    Returns: by arm the fields of the difference, and how it varies over seeds and documents.
    """
    pairs = {}
    for arm, runs in nats.items():
        both = [minus(own, nats[reference][seed]) for seed, own in runs.items() if seed in nats[reference]]
        if arm != reference and both:
            pairs[arm] = documents.paired(both)
    found = zip(pairs, adjust_holm(differences(list(pairs.values()))), pairs.values())
    return {arm: asdict(one) | dict(zip(SPREADS, deviations(pair.sums, pair.counts))) for arm, one, pair in found}


def interval(compared: Mapping[str, Any] | None) -> str:
    """ "-0.123 [-0.200, -0.100]", and * if p < 0.05 after Holm's correction; "" if there is no comparison."""
    if compared is None:
        return ""
    star = " *" if (compared["p"] if compared["p_holm"] is None else compared["p_holm"]) < ALPHA else ""
    return f"{compared['estimate']:+.3f} [{compared['low']:+.3f}, {compared['high']:+.3f}]{star}"
