"""Ways of learning together: what a client trains and sends in a round, and how the server uses it.

A federation holds what server and clients know. A client sends only the bytes of its messages (messages.py). The way
down is not limited: the server sends its whole state.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mft.config import TrainConfig
from mft.masks.convert import masked_modules, set_scores
from mft_study.arms.arm import Arm, Ground
from mft_study.arms.weights import clone_with_weights

from .aggregate import keep_probabilities, majority_mask, majority_sign, mean_update, sample_mask
from .messages import Message, decode_mask, decode_signs, encode_mask, encode_signs, encode_with_feedback

Messages = dict[str, Message]  # by matrix


class Federation:
    """What is learned together; clients are identified by their names."""

    def __init__(self, arm: Arm, ground: Ground) -> None:
        self.arm, self.ground = arm, ground
        self.trained = arm.untrained(ground)  # where clients train, one after the other

    def send(self, client: str, rows: Any, train: TrainConfig) -> Messages:
        """Train the client from the start of the round and return what it sends."""
        raise NotImplementedError

    def receive(self, messages: Sequence[Messages]) -> None:
        """Update the server from a round's messages; the next round begins there."""
        raise NotImplementedError

    def model(self) -> nn.Module:
        """Return the server's model, in eval mode."""
        raise NotImplementedError


class Updates(Federation):
    """Weights or adapters; clients send their updates, here in 32 bits per number: FedAvg."""

    def __init__(self, arm: Arm, ground: Ground) -> None:
        super().__init__(arm, ground)
        parameters = {name: p for name, p in self.trained.named_parameters() if p.requires_grad}
        self.held = {name: p.detach().clone() for name, p in parameters.items()}

    def send(self, client: str, rows: Any, train: TrainConfig) -> Messages:
        self._begin()
        self.arm.train(self.trained, self.ground, rows, train)
        moved = {name: self.trained.get_parameter(name).detach() - held for name, held in self.held.items()}
        return {name: self.encode(client, name, update.numpy()) for name, update in moved.items()}

    def receive(self, messages: Sequence[Messages]) -> None:
        for name, held in self.held.items():
            updates = [self.decode(one[name], tuple(held.shape)) for one in messages]
            held += torch.from_numpy(self.joined(updates)).to(held.dtype)

    def model(self) -> nn.Module:
        self._begin()
        return self.trained.eval()

    def encode(self, client: str, name: str, update: NDArray) -> Message:
        return np.frombuffer(update.tobytes(), np.uint8)

    def decode(self, message: Message, shape: tuple[int, ...]) -> NDArray:
        return message.view(np.float32).reshape(shape)

    def joined(self, updates: Sequence[NDArray]) -> NDArray:
        return mean_update(updates)

    def _begin(self) -> None:
        with torch.no_grad():
            for name, held in self.held.items():
                self.trained.get_parameter(name).copy_(held)


class MajorityOfSigns(Updates):
    """signSGD with majority vote (arXiv 1810.05291), with a step of the clients' mean length."""

    def encode(self, client: str, name: str, update: NDArray) -> Message:
        return encode_signs(update)

    def decode(self, message: Message, shape: tuple[int, ...]) -> NDArray:
        return decode_signs(message, shape)

    def joined(self, updates: Sequence[NDArray]) -> NDArray:
        return np.mean([np.abs(update).mean() for update in updates]) * majority_sign(updates)


class MeanOfSigns(MajorityOfSigns):
    """Signs with a scale, averaged; each client adds the error that they leave to its next update."""

    def __init__(self, arm: Arm, ground: Ground) -> None:
        super().__init__(arm, ground)
        self.errors: dict[tuple[str, str], NDArray] = {}

    def encode(self, client: str, name: str, update: NDArray) -> Message:
        error = self.errors.get((client, name), np.zeros_like(update))
        message, self.errors[client, name] = encode_with_feedback(update, error)
        return message

    def joined(self, updates: Sequence[NDArray]) -> NDArray:
        return mean_update(updates)


class MaskVotes(Federation):
    """Clients train and send a mask; a weight's share of votes is its probability to stay.

    A round begins with the scores s (2 p - 1), where s are the magnitudes' scores. A weight that all clients keep has
    its first score again. One that half of them keep is at the threshold.
    """

    def __init__(self, arm: Arm, ground: Ground) -> None:
        super().__init__(arm, ground)
        self.masked = masked_modules(self.trained)
        self.first = {name: module.scores.detach().clone() for name, module in self.masked.items()}
        self.kept: dict[str, NDArray] = {name: np.ones(scores.shape) for name, scores in self.first.items()}

    def send(self, client: str, rows: Any, train: TrainConfig) -> Messages:
        for name, module in self.masked.items():
            set_scores(module, self.scores(name))
        with self.training() as options:
            self.arm.train(self.trained, self.ground, rows, train, **options)
        known = self.known()
        return {
            name: encode_mask(self.vote(module.scores.detach()), known[name]) for name, module in self.masked.items()
        }

    def receive(self, messages: Sequence[Messages]) -> None:
        known = self.known()
        for name, before in self.kept.items():
            masks = [decode_mask(one[name], before.shape, known[name]) for one in messages]
            self.kept[name] = self.joined(masks, before)

    def model(self) -> nn.Module:
        """Return the model under the majority's mask."""
        for name, keeps in self.known().items():
            set_scores(self.masked[name], torch.from_numpy(np.where(keeps, 1.0, -1.0)).float())
        weights = self.arm.trained_weights(self.trained, self.ground)
        return clone_with_weights(self.ground.start, weights).eval()

    def known(self) -> dict[str, NDArray]:
        """Return the mask that server and clients both have: messages encode the difference from it."""
        return {name: majority_mask(kept) for name, kept in self.kept.items()}

    def scores(self, name: str) -> Tensor:
        """Return the scores with which a round begins."""
        return self.first[name] * torch.from_numpy(2 * self.kept[name] - 1).float()

    def vote(self, scores: Tensor) -> NDArray:
        return (scores >= 0).numpy()

    def joined(self, masks: Sequence[NDArray], before: NDArray) -> NDArray:
        return keep_probabilities(masks)

    @contextlib.contextmanager
    def training(self) -> Iterator[dict[str, Any]]:
        """Yield the options of train_loop."""
        yield {}


class StochasticMasks(MaskVotes):
    """FedPM (arXiv 2209.15328): a weight stays with probability sigmoid(score / TEMPERATURE), also in training.

    Each step and each vote draws its mask. The first probabilities follow from the magnitudes, so that few weights, the
    smallest ones, are dropped at random.
    """

    TEMPERATURE = 2e-3  # a tenth of the scores' RMS: at first 6 % of the weights, the smallest, are dropped
    LEAST = 1e-3  # distance of probabilities from 0 and 1, so that no weight is decided for ever
    STRENGTH = 1.0  # weight of earlier rounds, in votes of the clients that vote now

    def __init__(self, arm: Arm, ground: Ground) -> None:
        super().__init__(arm, ground)
        self.kept = {name: self.chances(scores).numpy() for name, scores in self.first.items()}
        self.generator = np.random.default_rng(ground.seed)

    def chances(self, scores: Tensor) -> Tensor:
        return torch.sigmoid(scores.double() / self.TEMPERATURE)

    def scores(self, name: str) -> Tensor:
        kept = torch.from_numpy(self.kept[name]).clamp(self.LEAST, 1 - self.LEAST)
        return (self.TEMPERATURE * torch.logit(kept)).float()

    def vote(self, scores: Tensor) -> NDArray:
        return sample_mask(self.chances(scores).numpy(), self.generator)

    def joined(self, masks: Sequence[NDArray], before: NDArray) -> NDArray:
        return keep_probabilities(masks, before=before, strength=self.STRENGTH * len(masks))

    @contextlib.contextmanager
    def training(self) -> Iterator[dict[str, Any]]:
        """Add logistic noise to the scores while gradients are computed: score + noise >= 0 has that probability."""
        noise: dict[str, Tensor] = {}

        @torch.no_grad()
        def add() -> None:
            for name, module in self.masked.items():
                drawn = self.generator.logistic(0, self.TEMPERATURE, module.scores.shape)
                noise[name] = torch.from_numpy(drawn).float()
                module.scores.add_(noise[name])

        @torch.no_grad()
        def take_away() -> None:
            for name, drawn in noise.items():
                self.masked[name].scores.sub_(drawn)

        add()
        yield {"before_update": lambda step, steps: take_away(), "on_step": lambda report: add()}
        take_away()
