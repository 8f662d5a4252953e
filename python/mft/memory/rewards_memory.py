"""Estimate the bytes that a step of training by rewards holds on the device, in its three phases.

The training samples a group's answers and then learns from them. It runs on one device, by autograd over the model's
own forward (rewards/train_rewards.py). Sizes are allocated bytes, as in estimate.py, and
tests/memory/test_rewards_memory.py compares them with runs.
"""

from collections.abc import Sequence

from mft.checks import check_one_of, check_rule
from mft.memory.activations import CHUNK, Layer
from mft.memory.shapes import ModelShape
from mft.memory.sizes import Sizes

LEARNERS = ("scores", "weights", "adapters", "everything")
_LOGITS_SAMPLED = 4  # fp32 tensors (answers, vocabulary): logits, scaled logits, probabilities, a copy of these
_LOGITS_LEARNED = 4  # fp32 tensors (chunk, vocabulary): logits, log-probabilities, two gradients


def rewards_memory(
    shape: ModelShape,
    *,
    learns: str,
    answers: int,
    prompt: int,
    completion: int,
    micro_batch: int | None = None,
    target_modules: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    gradient_checkpointing: bool = False,
    rank: int = 8,
    others: int = 0,
) -> dict[str, Sizes]:
    """Return bytes by kind for each phase (sampling, learning, update); the peak is the largest phase's sum.

    Args:
        learns: scores or weights of the target_modules, adapters of ``rank`` on them, or everything. Weights have fp32
            masters if they have 16 bits, and the initial ones are kept.
        answers: Number of answers that are sampled at once; micro_batch: backpropagated together, None for all.
        prompt, completion: Maximum number of tokens of each prompt and of each answer.
        target_modules, layers: None for attention and MLP, and for all layers.
        others: Bytes of other data on the device.
    Raises: ValueError for layers or modules that the model does not have.
    """
    check_one_of("learns", learns, LEARNERS)
    chosen = sorted(set(range(shape.layers) if layers is None else layers))
    inside = bool(chosen) and chosen[0] >= 0 and chosen[-1] < shape.layers
    check_rule(inside, "layers", f"lie in 0 to {shape.layers - 1} ({shape.name} has {shape.layers} layers)", chosen)
    for name, value in (("answers", answers), ("prompt", prompt), ("completion", completion)):
        check_rule(value >= 1, name, "be at least 1", value)
    targets = set(shape.targets(None if target_modules is None else list(target_modules)))
    sides = [sizes for name, sizes in shape.matrices.items() if name in targets]
    learned = len(chosen) * sum(rank * (n + k) if learns == "adapters" else n * k for n, k in sides)
    if learns == "everything":
        learned, targets, chosen = shape.parameters, set(shape.matrices), list(range(shape.layers))
    apart = learns in ("scores", "adapters")  # fp32, in addition to the weights
    masters = 4 if not apart and shape.dtype_bytes < 4 else 0
    resident = {
        "weights": shape.parameters * shape.dtype_bytes,
        "learned": learned * (4 if apart else shape.dtype_bytes + masters),
        "moments": 8 * learned,
        "masks": learned // 4 if learns == "scores" else 0,  # bits and signs
        "others": others,
    }
    length, rows = prompt + completion, min(micro_batch or answers, answers)
    cache = 2 * shape.layers * shape.kv_heads * shape.head_dim * shape.dtype_bytes
    filled = Layer(shape, answers * prompt, targets, rows=answers).forward_peak
    words = answers * shape.vocabulary
    sampling = {
        "cache": answers * length * cache,
        "activations": max(filled, 2 * answers * length * cache // shape.layers),
        "logits": words * (shape.dtype_bytes + 4 * _LOGITS_SAMPLED),
    }
    above = [
        Layer(shape, rows * length, targets if i in chosen else set(), rows=rows, input_grad=i > chosen[0], flash=True)
        for i in range(chosen[0], shape.layers)
    ]
    kept = [layer.hidden if gradient_checkpointing else layer.saved for layer in above]
    said = min(CHUNK, rows * completion)
    learning = {
        "gradients": 4 * learned,
        "activations": max(sum(kept[:i]) + layer.peak for i, layer in enumerate(above)),
        "logits": said * shape.vocabulary * (shape.dtype_bytes + 4 * _LOGITS_LEARNED),
    }
    return {
        phase: {kind: size for kind, size in (resident | sizes).items() if size}
        for phase, sizes in (("sampling", sampling), ("learning", learning), ("update", {"gradients": 4 * learned}))
    }


def rewards_peak(phases: dict[str, Sizes]) -> int:
    """Return the bytes of the largest phase."""
    return max(sum(sizes.values()) for sizes in phases.values())
