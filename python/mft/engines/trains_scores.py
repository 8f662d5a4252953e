"""What every way that trains scores alone says of them, by its ScoreStates."""

from torch import Tensor

from mft.engines.score_states import ScoreStates
from mft_kernels import MaskAdamW


class TrainsScores:
    """The part of step.Runner that is about what is learned."""

    in_lockstep = False

    @property
    def states(self) -> ScoreStates:
        raise NotImplementedError

    def check(self) -> None:
        """Raise NonFiniteScores, naming the layer, if the last step has made a score NaN or infinite."""
        self.states.check()

    def check_learned(self) -> None:
        """Nothing: check() has looked at every step."""

    def finish(self) -> None:
        """Nothing: the scores that learned are the model's own."""

    @property
    def optimizer(self) -> MaskAdamW:
        return self.states.optimizer

    def learned(self) -> dict[str, Tensor]:
        return self.states.learned()

    def result(self) -> dict[str, Tensor]:
        return self.states.result()

    def packed_masks(self) -> list[Tensor]:
        return self.states.packed_masks()

    def relearned(self) -> None:
        self.states.relearned()
