"""One of the configurations of an arm that validation chooses from."""

import json
from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """A value for each choice; None if the arm has no such choice."""

    lr: float | None = None
    epochs: float | None = None
    keep_ratio: float | None = None
    beta1: float | None = None
    alpha: float | None = None
    rank: int | None = None
    share: float | None = None
    config: str | None = None  # as JSON: all options of a PEFT method, or the format of a coded arm

    def __str__(self) -> str:
        parts = (
            *(("lr", self.lr), ("epochs", self.epochs), ("keep", self.keep_ratio), ("beta1", self.beta1)),
            ("alpha", self.alpha),
            ("rank", self.rank),
            ("share", self.share),
        )
        options = {} if self.config is None else json.loads(self.config)
        words = [f"{name} {value:g}" for name, value in parts if value is not None]
        for name, value in options.items():
            if name != "peft_type":  # commas separate the values of a setting
                words.append(f"{name} {'+'.join(map(str, value)) if isinstance(value, list) else value}")
        return ", ".join(words)


# Keys of an arm that hold values to choose from, each with the field of Setting that one of them becomes.
CHOICES = {
    "lrs": "lr",
    "epochs": "epochs",
    "keep_ratios": "keep_ratio",
    "beta1s": "beta1",
    "alphas": "alpha",
    "lora_ranks": "rank",
    "shares": "share",
}
