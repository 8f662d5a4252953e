"""What training tells of one optimiser step."""

from dataclasses import dataclass


@dataclass
class StepReport:
    """One optimiser step."""

    step: int  # from 1
    steps: int
    loss: float  # mean a token
    lr: float
    tokens: int  # of this step
    seconds: float  # since the loop began
