"""Ten clients learn together and send at most 1 bit per weight and round: masks, signs, or signs of adapters.

    python -m benchmarks.regimes.federated [--out runs/federated]     an estimated hour on two cores
    python -m benchmarks.regimes.federated --quick                    minutes; not for the record

A small Llama, trained from scratch on Python's library, learns C++ headers. Each client has the headers of one part of
torch, so no two have the same kind of text. In each of 20 rounds each client trains three steps from the server's model
and sends its result. The server's model is measured on the test files of all clients.

    FedAvg              the weights in 32 bits: a bound
    FedAvg of LoRA      adapters in 32 bits
    signSGD             signs of the weights' updates, their majority
    1-bit weights       the same signs, their mean, with error feedback
    1-bit LoRA          signs of the adapters' updates, with error feedback
    mask votes          masks; the share of clients that keep a weight
    stochastic masks    masks drawn from probabilities, as FedPM does

All change the linears of all layers. Bits per weight are the messages' bits divided by the number of weights in these
layers. Validation chooses each arm's rate with the first seed.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from mft.config import DataConfig, TrainConfig
from mft.data.corpora import header_files
from mft.data.splits import Splits
from mft.evaluation.evaluate import evaluate
from mft_study.evidence.power import Spread

from ..tables import markdown
from .arms import Way, control_arm, ground_of, lora_arm, mask_arm
from .federations import MajorityOfSigns, MaskVotes, MeanOfSigns, StochasticMasks, Updates
from .findings import ROWS, Documents, compare_arms, interval, nats_of
from .runs import CHOICE, SECONDS, Found, Regime, Run, best_rate, chosen_runs, load_base, quick_scratch, run_command
from .texts import write_texts

NATS, CURVE, UP = "nats", "validation by round", "bytes up"  # keys of a run's result
LOSS, BITS = "loss", "bits per weight up"
BOUND, RIVAL = "FedAvg", "signSGD"  # the arms that all others are compared with
# Parts of torch's headers by the prefix of their paths; the longest match counts.
CLIENTS = (
    *("ATen/", "ATen/core", "ATen/native", "c10/", "c10/core", "c10/util"),
    *("torch/csrc/api", "torch/csrc/autograd", "torch/csrc/distributed", "torch/csrc/jit"),
)


WAYS = {
    BOUND: Way(control_arm, Updates, [2e-3, 4e-3, 8e-3]),
    "FedAvg of LoRA": Way(lora_arm, Updates, [8e-3, 1.6e-2, 3.2e-2]),
    RIVAL: Way(control_arm, MajorityOfSigns, [1e-3, 2e-3, 4e-3]),
    "1-bit weights": Way(control_arm, MeanOfSigns, [2e-3, 4e-3, 8e-3]),
    "1-bit LoRA": Way(lora_arm, MeanOfSigns, [8e-3, 1.6e-2, 3.2e-2]),
    "mask votes": Way(mask_arm, MaskVotes, [8e-3, 1.6e-2, 3.2e-2]),
    "stochastic masks": Way(mask_arm, StochasticMasks, [4e-3, 8e-3, 1.6e-2]),
}


def _local() -> TrainConfig:
    return TrainConfig(steps=3, batch_size=4, schedule="constant", warmup_ratio=0.0, betas=(0, 0.99))


@dataclass(frozen=True)
class Federated(Regime):
    """The regime over the ways that rates names."""

    clients: dict[str, DataConfig] = field(default_factory=dict)
    rounds: int = 20
    looks: int = 4  # evaluations on validation, at equal distances
    local: TrainConfig = field(default_factory=_local)  # in a round; the rate is the run's and falls to 0

    assumed = Spread(0.01, 0.1, "a smaller model after four rounds")

    def texts(self) -> dict[str, DataConfig]:
        return self.clients

    def run(self, base: Path, run: Run) -> Found:
        """Return NATS: by client, for each document of its test files; UP: by round, each client's bytes."""
        model, tokenizer = load_base(base)
        splits, way = self.splits(tokenizer, run.seed), WAYS[run.arm]
        arm = way.arm(lrs=self.rates[run.arm])
        ground = ground_of(model, arm, run)
        federation, up, curve = way.method(arm, ground), [], []
        for number in range(self.rounds):
            lr = run.lr * (1 - number / self.rounds)
            messages = []
            for place, (client, own) in enumerate(splits.items()):
                order = (run.seed * self.rounds + number) * len(splits) + place
                train = dataclasses.replace(self.local, lr=lr, seed=order)
                messages.append(federation.send(client, own.train, train))
            up.append([sum(map(len, one.values())) for one in messages])
            federation.receive(messages)
            if (number + 1) * self.looks % self.rounds < self.looks:
                curve.append([number + 1, self.loss(federation.model(), splits)])
        learned = federation.model()
        nats = {client: nats_of(learned, own.test) for client, own in splits.items()}
        return {CHOICE: curve[-1][1], CURVE: curve, UP: up, NATS: nats, "weights": ground.numbers()}

    def loss(self, model: nn.Module, splits: dict[str, Splits]) -> float:
        """Return the validation loss, averaged over clients."""
        return float(np.mean([evaluate(model, own.validation, batch_size=ROWS).loss for own in splits.values()]))

    def arms(self, found: dict[Run, Found], documents: Documents) -> dict[str, Any]:
        """Return the mean test loss over clients, the bits that each client sends per round, and the differences."""
        runs = {arm: chosen_runs(self, found, arm) for arm in self.rates}
        nats = {arm: {seed: one[NATS] for seed, one in own.items()} for arm, own in runs.items()}
        against = {other: compare_arms(nats, other, documents) for other in (BOUND, RIVAL) if other in nats}
        arms = {}
        for arm, own in runs.items():
            bits = [8 * np.array(one[UP]) / one["weights"] for one in own.values()]
            arms[arm] = {
                "lr": best_rate(self, found, arm),
                LOSS: float(np.mean([documents.mean_loss(one) for one in nats[arm].values()])),
                BITS: float(np.mean(bits)),
                f"most {BITS}": float(np.max(bits)),
                CURVE: np.mean([one[CURVE] for one in own.values()], axis=0).round(4).tolist(),
                SECONDS: float(np.mean([one[SECONDS] for one in own.values()])),
            } | {f"{LOSS} - {other}": differences.get(arm) for other, differences in against.items()}
        return arms

    def table(self, arms: dict[str, Any]) -> str:
        others = [other for other in (BOUND, RIVAL) if other in arms]
        rows = []
        for arm, one in sorted(arms.items(), key=lambda item: item[1][LOSS]):
            intervals = [interval(one[f"{LOSS} - {other}"]) for other in others]
            bits = [f"{one[name]:.3f}" for name in (BITS, f"most {BITS}")]
            curve = ", ".join(f"{loss:.3f}" for _, loss in one[CURVE])
            rows.append([arm, f"{one['lr']:g}", *bits, f"{one[LOSS]:.3f}", *intervals, curve, f"{one[SECONDS]:.0f}"])
        header = ["arm", "rate", BITS, "at most", LOSS, *(f"- {other}" for other in others), CURVE, "s per run"]
        return "\n\n".join(
            [
                f"# {len(self.clients)} clients, {self.rounds} rounds",
                f"Mean test loss over the clients, nats per token; {len(self.seeds)} seeds; 95 % intervals; * where "
                "p < 0.05 after Holm's correction over the arms. Bits: of a client's messages in a round, per weight "
                "of the layers; mean, and the largest of any client and round.",
                markdown(header, rows),
            ]
        )


def default_clients(directory: Path, train_tokens: int, eval_tokens: int) -> dict[str, DataConfig]:
    """Return one file of headers per client, written into directory if missing."""
    texts: dict[str, dict[str, str]] = {client: {} for client in CLIENTS}
    for place, text in header_files().items():
        if fitting := [client for client in CLIENTS if place.startswith(client)]:
            texts[max(fitting, key=len)][place] = text
    found = {}
    for client, own in texts.items():
        path = directory / f"{client.strip('/').replace('/', '-')}.jsonl"
        if not path.is_file():
            write_texts(path, own)
        found[client] = DataConfig(
            source=str(path), sequence_length=256, max_train_tokens=train_tokens, max_eval_tokens=eval_tokens
        )
    return found


def declare(texts: Path, *, quick: bool) -> Federated:
    """Declare the regime; quick: small model, four rounds, two seeds, two rates. texts: where the clients' files go."""
    if quick:
        rates, clients = {arm: way.rates[1:] for arm, way in WAYS.items()}, default_clients(texts, 8_192, 2_048)
        return Federated(rates=rates, seeds=[0, 1], scratch=quick_scratch(), extensions=0, clients=clients, rounds=4)
    rates, clients = {arm: way.rates for arm, way in WAYS.items()}, default_clients(texts, 32_768, 2_048)
    return Federated(rates=rates, seeds=[0, 1, 2], extensions=1, clients=clients)


if __name__ == "__main__":
    run_command(__doc__, "federated", declare)
