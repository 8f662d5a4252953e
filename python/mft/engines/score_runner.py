"""The base class of all runners that train only scores."""

from torch import Tensor

from mft.engines.score_states import ScoreStates
from mft.engines.step import Runner
from mft_kernels import MaskAdamW


class ScoreRunner(Runner):
    """Trains scores, which its ScoreStates hold."""

    states: ScoreStates

    def check(self) -> None:
        """Raise NonFiniteScores, which names the layer, if the last step made a score NaN or infinite."""
        self.states.check()

    @property
    def optimizer(self) -> MaskAdamW:
        return self.states.optimizer

    def learned(self) -> dict[str, Tensor]:
        return self.states.learned()

    def result(self) -> dict[str, Tensor]:
        return self.states.result()

    def packed_masks(self) -> list[Tensor]:
        return self.states.packed_masks()

    def refresh(self) -> None:
        self.states.refresh()
