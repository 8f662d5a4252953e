"""The settings that decide, together with the model, how much memory a training step needs."""

from dataclasses import dataclass

from mft.checks import SHARE, check_one_of, check_rule
from mft.config import BUDGET, DTYPES, MOMENTS, OBJECTIVES, QUANTIZATIONS, SCORES_DTYPES, WAYS
from mft.number_formats import AUTO, state_bytes


@dataclass(frozen=True)
class Workload:
    """The settings of a training run; the fields are named as in the run's configuration.

    Args:
        memory: a mode, or auto (fit.choose then chooses, as for scores and moments).
        layers, target_modules: those that are masked; None for all.
        sequence: Tokens per row. micro_batch: Rows per micro-batch. accumulation: Micro-batches per step of all
        processes. batches_at_once: Micro-batches whose boundaries layerwise holds together; None for all, or for as
        many as fit. processes: Number of processes that train together, each with its own memory or its share of one.
        reduces_every_batch: Whether sharded sums gradients in each micro-batch instead of once per step.
        grad_dtype: dtype of the gradient buffers; None for the weights' dtype.
        quantization: Format of the base, or None; quantize_masked: whether masked weights are quantised too.
        clipping: Whether the gradients' global norm is clipped, which layerwise does not support.
        keep_ratio: Share of the masked weights that is kept; 0 if a fixed threshold leaves it open.
        fixed_threshold: Whether masks use a given threshold, which int16 scores do not support.
        budget: Largest share of all masked weights that one shared threshold drops; None for one threshold per layer.
        teacher_bytes: Bytes of a teacher's weights on the device.
        device: "cuda", which has its own memory, or "cpu", which shares the host's.
    """

    memory: str = "auto"
    layers: tuple[int, ...] | None = None
    target_modules: tuple[str, ...] | None = None
    sequence: int = 4096
    micro_batch: int = 1
    accumulation: int = 128
    batches_at_once: int | None = None
    processes: int = 1
    scores: str = "float32"
    moments: str = "float32"
    grad_dtype: str | None = None
    quantization: str | None = None
    quantize_masked: bool = False
    gradient_checkpointing: bool = False
    clipping: bool = False
    keep_ratio: float = 0.99
    fixed_threshold: bool = False
    budget: float | None = None
    objective: str = "cross_entropy"
    teacher_bytes: int = 0
    device: str = "cuda"
    reduces_every_batch: bool = False

    def __post_init__(self) -> None:
        check_one_of("memory", self.memory, ("auto", *WAYS))
        check_one_of("scores", self.scores, (AUTO, *SCORES_DTYPES))
        check_one_of("moments", self.moments, (AUTO, *MOMENTS))
        check_one_of("objective", self.objective, tuple(OBJECTIVES))
        check_one_of("device", self.device, ("cuda", "cpu"))
        SHARE.check("keep_ratio", self.keep_ratio)
        if self.budget is not None:
            BUDGET.check("budget", self.budget)
        if self.grad_dtype is not None:
            check_one_of("grad_dtype", self.grad_dtype, DTYPES)
        if self.quantization is not None:
            check_one_of("quantization", self.quantization, QUANTIZATIONS)
            check_rule(
                self.memory in ("auto", "quantized", "layerwise"),
                "memory",
                "be quantized, layerwise or auto over a quantised base",
                self.memory,
            )
        check_rule(
            self.quantization is not None or not self.quantize_masked or self.memory in ("auto", "quantized"),
            "quantization",
            f"be {' or '.join(QUANTIZATIONS)} with quantize_masked",
            self.quantization,
        )
        for name in ("micro_batch", "accumulation", "processes"):
            check_rule(getattr(self, name) >= 1, name, "be at least 1", getattr(self, name))
        check_rule(
            self.accumulation >= self.processes,
            "accumulation",
            f"be at least {self.processes}, the number of processes, each of which takes whole micro-batches",
            self.accumulation,
        )
        at_once = self.batches_at_once
        check_rule(at_once is None or at_once >= 1, "batches_at_once", "be at least 1", at_once)
        check_rule(self.sequence >= 2, "sequence", "be at least 2", self.sequence)

    @property
    def tokens(self) -> int:
        """Tokens per micro-batch."""
        return self.micro_batch * self.sequence

    @property
    def of_base(self) -> bool:
        """Whether the objective also runs the base, which has its own chain of hidden states."""
        return OBJECTIVES[self.objective].of_base

    @property
    def own_accumulation(self) -> int:
        """Micro-batches per step of the process that takes the most."""
        return -(-self.accumulation // self.processes)

    @property
    def together(self) -> int:
        """Micro-batches whose boundaries layerwise holds together."""
        return min(self.batches_at_once or self.own_accumulation, self.own_accumulation)

    @property
    def portions(self) -> int:
        """Number of portions in which layerwise runs the micro-batches of a step."""
        return -(-self.own_accumulation // self.together)

    @property
    def state_bytes(self) -> float:
        """Bytes per score with its moments, as they are stored."""
        return state_bytes(self.scores, self.moments)
