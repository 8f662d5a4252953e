"""What another arm trained, in few bits per number and entropy-coded (number_codes.py), evaluated once decoded.

What is coded is the difference from the start, or for adapters from what the method drew from the seed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from mft.checks import check_rule, one_of
from mft.config import MaskConfig
from mft.files.figure import COLOURS
from mft.number_formats import CODED_FORMATS
from mft_study.arms.adapters import Adapters
from mft_study.arms.arm import Arm, Ground
from mft_study.arms.weights import Weights, load_weights
from mft_study.peft_methods import MethodFailsError

if TYPE_CHECKING:
    from torch import Tensor, nn

_STREAM = "stream"  # the key in its file


@dataclass
class Coded(Arm):
    """What the arm `of` trained, in one of `formats` and entropy-coded; with `shares`, only its largest numbers."""

    # to choose from: bf16, int8 (in blocks of 64), nf4, int4
    formats: Annotated[list[str], one_of(CODED_FORMATS)] = field(default_factory=list)

    takes = frozenset({"of", "shares"})
    needs = frozenset({"of"})
    near = True
    colour = COLOURS["coded"]
    joined = False  # its sources are different arms
    makes_weights = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rule(bool(self.formats), "formats", f"hold at least one of {', '.join(CODED_FORMATS)}", self.formats)

    def may_be_of(self, source: type[Arm]) -> bool:
        return source.compressible or issubclass(source, Adapters)

    def choices(self, mask: MaskConfig) -> dict[str, list[Any]]:
        formats = dict.fromkeys(self.formats)
        return super().choices(mask) | {"config": [json.dumps({"format": one}) for one in formats]}

    def made_weights(self, ground: Ground) -> Weights:
        import torch

        return {_STREAM: torch.frombuffer(bytearray(self._stream(ground)), dtype=torch.uint8)}

    def model_with(self, ground: Ground, weights: Weights) -> nn.Module:
        from mft_study.number_codes import decode

        source = ground.source
        begun, stream = source.start_weights(ground), weights[_STREAM].numpy().tobytes()
        steps = decode(stream, begun, _format(ground), ground.setting.share)
        return source.model_with(ground, {name: begun[name].float().cpu() + step for name, step in steps.items()})

    def stored_bytes(self, ground: Ground, model: nn.Module) -> int:
        return len(self._stream(ground))

    def resident_bytes(self, ground: Ground, model: nn.Module) -> int:
        """Return its source's: it is decoded before it runs."""
        return ground.source.resident_bytes(ground, model)

    def _stream(self, ground: Ground) -> bytes:
        from mft_study.number_codes import encode

        source = ground.source
        begun, ended = source.start_weights(ground), load_weights(source.path)
        steps: dict[str, Tensor] = {name: ended[name].float() - begun[name].float().cpu() for name in begun}
        try:
            return encode(steps, _format(ground), ground.setting.share)
        except ValueError as error:
            raise MethodFailsError(f"{source.arm.kind} cannot be coded: {error}") from None


def _format(ground: Ground) -> str:
    assert ground.setting.config is not None  # choices() gives one
    return json.loads(ground.setting.config)["format"]
