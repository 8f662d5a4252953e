"""What does the threshold of 16.7M scores cost, against PyTorch's ways to find a k-th largest magnitude?"""

import torch

import mft_kernels
from mft_kernels.testing import random_inputs

from .harness import Finding, ratio, report, time_interleaved, times
from .rivals import KEEP_RATIO

FEATURES = 4096
ROUNDS = 3


def measure(dtype: torch.dtype) -> list[Finding]:
    """One dtype of the scores."""
    scores = random_inputs(1, FEATURES, FEATURES, scores_dtype=dtype).scores.flatten()
    dropped = int((1 - KEEP_RATIO) * scores.numel())
    kept = scores.numel() - dropped
    competitors = {
        "kept_threshold": lambda: mft_kernels.kept_threshold(scores, KEEP_RATIO),
        "sort": lambda: scores.abs().sort().values[dropped],
        "kthvalue": lambda: scores.abs().kthvalue(dropped + 1).values,
        "topk": lambda: scores.abs().topk(kept, sorted=False).values.min(),
    }
    answers = {name: compute().item() for name, compute in competitors.items()}
    if len(set(answers.values())) != 1:
        raise RuntimeError(f"the ways to find the threshold disagree: {answers}")
    samples = time_interleaved(competitors, ROUNDS)
    suffix = f", {str(dtype).removeprefix('torch.')}"
    return [
        *times(samples, suffix),
        ratio(samples, "sort", "kept_threshold", "at least", 10, suffix),
        ratio(samples, "kthvalue", "kept_threshold", None, None, suffix),
        ratio(samples, "topk", "kept_threshold", None, None, suffix),
    ]


def main() -> None:
    """Print and store the answer."""
    findings = [*measure(torch.float32), *measure(torch.bfloat16)]
    report("kept_threshold", f"The threshold that keeps 90 % of {FEATURES * FEATURES:,} scores", findings)
