"""Mixtures of experts on cards that we do not have: estimate and simulate what each way needs.

    python -m benchmarks.memory mixtures

Estimate and simulation may differ by 5 % on device and host. Simulated sizes are no measurements: the engines ran on
fake tensors, at the published sizes.
"""

from dataclasses import dataclass
from unittest import mock

from benchmarks.memory.simulated_step import simulate_step
from mft.memory.estimate import Estimate, estimate
from mft.memory.fit import RESERVE
from mft.memory.shapes import known_config, shape_from_config
from mft.memory.workload import Workload
from mft.models import token_loss

from ..harness import Finding, Spread

MODELS = ("gpt-oss-20b", "qwen3-30b-a3b", "mixtral-8x7b")
CARDS = (12e9, 24e9, 80e9)
SETTINGS = {
    "plain, 4 layers": Workload("plain", (4, 5, 6, 7), accumulation=2),
    "resident, 4 layers": Workload("resident", (4, 5, 6, 7), accumulation=2),
    "quantized, 4 layers": Workload("quantized", (4, 5, 6, 7), accumulation=2, quantization="nf4"),
    "layerwise, 4 layers": Workload("layerwise", (4, 5, 6, 7), accumulation=2),
    "layerwise, all layers": Workload("layerwise", accumulation=2),
    "layerwise, all layers, 16-bit scores, 8-bit moments": Workload(
        "layerwise", accumulation=2, scores="int16", moments="8bit"
    ),
    "resident, attention of all layers": Workload(
        "resident", target_modules=("q_proj", "k_proj", "v_proj", "o_proj"), accumulation=2
    ),
}
MOST = 0.05  # largest relative difference of estimate and simulation


@dataclass(frozen=True)
class Both:
    """The estimate of one setting of one model, and its simulated bytes on device and host."""

    estimated: Estimate
    device: int
    host: int

    @property
    def apart(self) -> float:
        """The larger of both differences, as a share of the simulated value."""
        pairs = (self.estimated.device_peak, self.device), (self.estimated.host_peak, self.host)
        return max(abs(ours - theirs) / theirs for ours, theirs in pairs if theirs)

    @property
    def card(self) -> float | None:
        """The smallest of CARDS that holds the simulated peak and the reserve; None if none does."""
        return next((card for card in CARDS if self.device + RESERVE["cuda"] <= card), None)


def compare(model: str, workload: Workload) -> Both:
    """Estimate and simulate one setting."""
    config = known_config(model)
    with mock.patch.object(token_loss, "rows_at_once", len):  # all rows of a chunk in fp32 at once, as on a GPU
        found = simulate_step(config, workload, steps=2 if workload.memory == "plain" else 1)  # it makes moments late
    return Both(estimate(shape_from_config(config, model), workload), found.device_peak, found.host_peak)


def findings_of(model: str) -> list[Finding]:
    """Return the findings of all SETTINGS. Each is printed when it is ready."""
    findings = []
    for setting, workload in SETTINGS.items():
        both, name = compare(model, workload), f"{model}, {setting}"
        sizes = {"estimated": both.estimated.device_peak, "simulated": both.device}
        sizes |= {"estimated, host": both.estimated.host_peak, "simulated, host": both.host}
        findings += [Finding(f"{name}: {what}", Spread.of([size / 1e9]), "GB") for what, size in sizes.items()]
        findings.append(Finding(f"{name}: apart", Spread.of([both.apart]), "of it", "at most", MOST))
        if both.card is not None:
            findings.append(Finding(f"{name}: smallest card that holds it", Spread.of([both.card / 1e9]), "GB"))
        fits = "no card of 80 GB or less" if both.card is None else f"a card of {both.card / 1e9:.0f} GB"
        peaks = "  ".join(f"{what} {size / 1e9:.2f}" for what, size in sizes.items())
        print(f"{name}: {peaks} GB, {both.apart:.1%} apart; {fits}", flush=True)
    return findings
