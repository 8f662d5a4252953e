"""What decides how much memory a training step needs, beside the model."""

from dataclasses import dataclass

from mft.checks import check_one_of, check_rule
from mft.config import BUDGET, DTYPES, MOMENTS, OBJECTIVES, QUANTIZATIONS, SCORES_DTYPES, WAYS, MaskConfig
from mft.number_formats import AUTO, state_bytes


@dataclass(frozen=True)
class Workload:
    """One way to train; the fields are named as in the run's configuration.

    Args:
        memory: plain, in_place, resident, quantized, layerwise, sharded; auto where the choice is asked for.
        layers: that are masked, None for all. target_modules: linears in them, None for all.
        sequence: tokens a row. micro_batch: rows at once. accumulation: micro-batches a step, of all processes.
        batches_at_once: micro-batches whose boundaries layerwise holds together, None for all of a step (or, for
            fit.choose, for as many as fit).
        processes: that train together, each with a memory of its own or its share of one.
        scores, moments: dtypes at rest; auto where the choice is asked for.
        reduces_every_batch: whether sharded sums gradients in each micro-batch, and not once a step.
        grad_dtype: of the gradient buffers, None for the weights'.
        quantization: of the base, None for none. quantize_masked: the masked layers' weights too.
        gradient_checkpointing: of plain and in_place; the other ways recompute every layer anyhow.
        clipping: of the gradients' global norm, which layerwise does not have.
        keep_ratio: share of the masked weights that is kept; 0 where a fixed threshold leaves it open.
        fixed_threshold: whether masks keep what lies above a given one, which int16 scores do not have.
        budget: share of all masked weights that is dropped by one threshold, None for one each layer.
        objective: cross_entropy, kl, distill or dpo. teacher_bytes: of a teacher's weights on the device.
        device: "cuda", which has a memory of its own, or "cpu", which shares the host's.
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
    keep_ratio: float = MaskConfig.keep_ratio
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
        """Of a micro-batch."""
        return self.micro_batch * self.sequence

    @property
    def of_base(self) -> bool:
        """Whether a second chain of hidden states, the base's, goes up beside the first."""
        return OBJECTIVES[self.objective].of_base

    @property
    def own_accumulation(self) -> int:
        """Micro-batches a step of the process that takes most."""
        return -(-self.accumulation // self.processes)

    @property
    def together(self) -> int:
        """Micro-batches whose boundaries layerwise holds together."""
        return min(self.batches_at_once or self.own_accumulation, self.own_accumulation)

    @property
    def portions(self) -> int:
        """In how many parts layerwise takes a step."""
        return -(-self.own_accumulation // self.together)

    @property
    def state_bytes(self) -> float:
        """A score with its moments, at rest."""
        return state_bytes(self.scores, self.moments)
