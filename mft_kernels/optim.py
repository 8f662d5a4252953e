"""MaskAdamW: AdamW on scores, with moments in 8 bits or fp32, by the op score_step."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from .mask.scores import Scores
from .operands import clocks_of
from .ops.checks import BLOCK, check_adam, check_mode, check_stepped
from .ops.select import select_mask
from .ops.step import scalar_of, score_step
from .page_locked import empty_locked, zeros_locked
from .shards import bands_of, check_spread, is_spread, rows_here, split_bands, spread_like

MOMENTS = ("8bit", "fp32")
_PLACE_BITS = 20  # lowest bits of a key: the parameter's place; the 12 above: the band, if it is spread


class MaskAdamW(Optimizer):
    """AdamW for score matrices in fp32, bf16 or int16 fixed point. The 16-bit ones are rounded stochastically.

    step() works like that of any optimiser, on every parameter that has a .grad (d_scores, of any shape). step_one()
    steps one matrix from grad_output.T @ x: it applies the factors weight and sign(scores), and finds the next mask.

    A parameter's stochastic rounding depends on seed * 2^32 + the parameter's place among all parameters, and on its
    step. So a run that is resumed from state_dict repeats bit for bit if parameters are given in the same order.

    Parameters that fully_shard (FSDP2) has spread are DTensors, and so are their moments. Each process steps its own
    rows, and the result has the same bits on any number of processes. With fp32 scores and moments, plain parameters
    give the same bits too. Otherwise a matrix is rounded in bands of rows (shards.py), with the same errors.

    Args:
        params: tensors or groups of tensors; float32, bfloat16, or int16 with requires_grad=False, for step_one only.
        lr: score units per step; the paper's 2e-5 moves a score by 0.1 % of the usual scale of 0.02.
        moments: "8bit", with 2 bytes per weight and 2 floats per block of 256; or "fp32", which with fp32 scores equals
            torch.optim.AdamW(foreach=False) bit for bit.
        mode: "magnitude" or "value"; for step_one.
        seed: in [0, 2^31).
        capturable: count the steps on the device, so that each replay of a CUDA graph with a captured step counts too.
            lr may then be a tensor () on that device, which each replay reads; a number keeps its value of the capture.
            Each parameter must take a step before the capture, which makes its moments. step() then launches about 20
            small kernels per group, and one or more per parameter; step_one() launches them for its parameter alone.
    Each group may have its own lr, betas, eps, weight_decay, moments, mode, seed and capturable.
    Raises: ValueError or TypeError, naming the option. ValueError for parameters that are not spread by rows, or not in
        whole bands.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 3e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        moments: str = "8bit",
        mode: str = "magnitude",
        seed: int = 0,
        capturable: bool = False,
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, options | {"moments": moments, "mode": mode, "seed": seed, "capturable": capturable})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled state, also one without ``capturable``."""
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("capturable", False)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Check a group's options and dtypes, then add it."""
        options = {**self.defaults, **param_group}
        lr = 0.0 if options["capturable"] and isinstance(options["lr"], Tensor) else options["lr"]
        check_adam(lr, options["betas"], options["eps"], options["weight_decay"])
        check_mode(options["mode"])
        if options["moments"] not in MOMENTS:
            raise ValueError(f"moments must be one of {MOMENTS}, got {options['moments']!r}")
        if not isinstance(options["seed"], int) or not 0 <= options["seed"] < 2**31:
            raise ValueError(f"seed must be an integer in [0, 2^31), got {options['seed']!r}")
        super().add_param_group(param_group)
        try:
            for p in param_group["params"]:
                if hasattr(p, "ds_id"):
                    raise ValueError(
                        "params must not be partitioned by DeepSpeed, which splits them into flat parts instead of "
                        f"rows, got one of shape {tuple(getattr(p, 'ds_shape', p.shape))}: use FSDP2 (fully_shard)"
                    )
                if is_spread(p):
                    narrow = p.dtype != torch.float32 or options["moments"] != "fp32"
                    check_spread("params", p, in_bands=narrow)
                check_stepped("params", p)
                if not p.is_contiguous():
                    raise ValueError(f"params must be contiguous, got strides {p.stride()}; use p.contiguous()")
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a .grad. Return what closure returned, or None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params, done = [p for p in group["params"] if p.grad is not None], []
            tensors = [self.tensors(p) for p in params]
            try:
                for p, own, now in zip(params, tensors, self._next(group, params)):
                    self._step(p, rows_here(p.grad), None, own, {}, now)
                    done.append(p)
            finally:
                self._count(done)
        return loss

    @torch.no_grad()
    def step_one(
        self,
        p: Tensor,
        grad: Tensor,
        weight: Tensor | None = None,
        *,
        tensors: dict[str, Tensor] | None = None,
        grad_scale: Tensor | None = None,
        keep_ratio: float | None = None,
        threshold: Tensor | None = None,
        pattern: str = "matrix",
    ) -> tuple[Tensor, Tensor] | None:
        """Run score_step on one of params with the options of its group, and count the step.

        Args:
            p: (N, K), or (E, N, K) for experts, each of which then keeps keep_ratio.
            grad, weight, grad_scale, keep_ratio, threshold: see score_step; grad and weight have p's shape. If p is
                spread, grad and weight are plain tensors with this process's rows, and keep_ratio is None: no process
                knows the threshold by itself.
            pattern: where keep_ratio holds; see MaskedLinear.
            tensors: copies of tensors(p) on grad's device, updated instead of the originals.
        Returns: (threshold, packed mask) of the new scores if keep_ratio is given. For experts, (E,) and one mask each.
        Raises: ValueError if p is not one of params.
        """
        asked = {"grad_scale": grad_scale, "keep_ratio": keep_ratio, "threshold": threshold}
        tensors = self.tensors(p) if tensors is None else tensors
        (now,) = self._next(self._place(p)[0], [p])
        result = self._step(p, grad, weight, tensors, asked, now, pattern)
        self._count([p])
        return result

    def tensors(self, p: Tensor) -> dict[str, Tensor]:
        """Return what a step of p updates: "scores" (p itself), "exp_avg", "exp_avg_sq" and, in 8 bits, "scales".

        Moments begin at zero, on p's device, pinned if p is. If p is spread, all are this process's rows, and scales
        have shape (bands, 2, blocks of a band).
        """
        group, _ = self._place(p)
        state = self.state[p]
        if not state:
            own = rows_here(p)
            zeros = zeros_locked if own.is_pinned() else functools.partial(torch.zeros, device=p.device)
            in_8_bits = group["moments"] == "8bit"
            if _is_captured():
                raise RuntimeError(
                    "params must have taken a step before a step is captured into a CUDA graph, got one of shape "
                    f"{tuple(p.shape)} without moments, which each replay would set to 0; take a few steps first"
                )
            state["step"] = torch.zeros((), dtype=torch.int64, device=p.device) if group["capturable"] else 0
            for name in ("exp_avg", "exp_avg_sq"):
                moments = zeros(own.shape, dtype=torch.uint8 if in_8_bits else torch.float32)
                state[name] = spread_like(moments, p, p.shape) if is_spread(p) else moments
            if in_8_bits and not is_spread(p):
                state["scales"] = zeros((2, -(-p.numel() // BLOCK)), dtype=torch.float32)
            elif in_8_bits:
                bands = bands_of(p.shape)
                each = (2, -(-p.numel() // bands // BLOCK))
                scales = zeros((len(list(split_bands(p))), *each), dtype=torch.float32)
                state["scales"] = spread_like(scales, p, (bands, *each))
        own_state = {name: rows_here(tensor) for name, tensor in state.items() if name != "step"}
        return {"scores": rows_here(p) if is_spread(p) else p, **own_state}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load options and states. States are copied and keep their dtypes; torch's own method casts them to p's.

        ``capturable`` is not loaded: each group keeps its own.
        """
        capturable = [group["capturable"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, own in zip(self.param_groups, capturable):
            group["capturable"] = own
            if not own:
                group["lr"] = float(group["lr"])
        places = [place for group in state_dict["param_groups"] for place in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for place, p in zip(places, params):
            for name, value in state_dict["state"].get(place, {}).items():
                if name == "step":
                    on_device = self._place(p)[0]["capturable"]
                    self.state[p][name] = torch.tensor(int(value), device=p.device) if on_device else int(value)
                elif isinstance(value, Tensor) and is_spread(value):
                    self.state[p][name] = spread_like(rows_here(value).to(p.device, copy=True), p, value.shape)
                elif isinstance(value, Tensor):
                    copy = empty_locked(value.shape, value.dtype).copy_(value) if p.is_pinned() else None
                    self.state[p][name] = value.to(p.device, copy=True) if copy is None else copy

    def _place(self, p: Tensor) -> tuple[dict[str, Any], int]:
        """Return p's group, and p's place among all parameters."""
        place = 0
        for group in self.param_groups:
            for other in group["params"]:
                if other is p:
                    return group, place
                place += 1
        raise ValueError(f"p must be one of the optimiser's parameters, got another tensor of shape {tuple(p.shape)}")

    def _next(self, group: dict[str, Any], params: list[Tensor]) -> list[tuple[Any, Any]]:
        """Return step and lr of the next score_step of each of a group's params.

        Steps that are counted on the device share the launches that make their clocks.
        """
        on_device: dict[tuple, list[Tensor]] = {}
        for p in params:
            if isinstance(self.state[p]["step"], Tensor):
                on_device.setdefault((p.device, "scales" in self.state[p]), []).append(p)
        clocks: dict[Tensor, tuple[Any, Any]] = {}
        for (_, in_8_bits), some in on_device.items():
            lr = scalar_of("lr", group["lr"], some[0])
            steps = torch.stack([self.state[p]["step"] for p in some]) + 1
            rows = clocks_of(steps, lr, *group["betas"], group["weight_decay"], in_8_bits)
            clocks |= {p: (row, lr) for p, row in zip(some, rows)}
        return [clocks.get(p) or (self.state[p]["step"] + 1, group["lr"]) for p in params]

    def _count(self, params: list[Tensor]) -> None:
        on_device = []
        for state in map(self.state.__getitem__, params):
            if isinstance(state["step"], Tensor):
                on_device.append(state["step"])
            else:
                state["step"] += 1
        if on_device:
            torch._foreach_add_(on_device, 1)

    def _step(
        self,
        p: Tensor,
        grad: Tensor,
        weight: Tensor | None,
        tensors: dict[str, Tensor],
        asked: dict[str, Any],
        now: tuple[Any, Any],
        pattern: str = "matrix",
    ) -> tuple[Tensor, Tensor] | None:
        """Take the step with the number and rate ``now``, without counting it."""
        group, place = self._place(p)
        if _is_captured():
            if not group["capturable"]:
                raise RuntimeError(
                    "capturable must be True if a CUDA graph captures a step, got False: each replay would use the "
                    "step number and the learning rate of this step; use MaskAdamW(..., capturable=True)"
                )
            if isinstance(p, Scores):
                p.in_graph = True  # step_one is no Optimizer.step, after which a hook sets this
        if grad.is_sparse:
            raise TypeError("grad must be dense, got a sparse tensor; a score gradient has no zeros to leave out")
        if is_spread(p) and asked.get("keep_ratio") is not None:
            raise ValueError(
                f"keep_ratio must be None for scores that are spread over processes, got {asked['keep_ratio']}: a "
                "threshold needs the scores of all processes; see mask/shared_threshold.py"
            )
        # The step finds one threshold for one matrix. For experts, and for a pattern, the masks are selected after it.
        ratio = asked.get("keep_ratio") if tensors["scores"].dim() == 3 or pattern != "matrix" else None
        if ratio is not None:
            asked = asked | {"keep_ratio": None, "threshold": None}
        result = None
        for key, of_part in _parts(p, place, (tensors["scores"].detach(), grad, weight), tensors):
            result = score_step(
                *of_part,
                step=now[0],
                lr=now[1],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                seed=group["seed"] << 32 | key,
                mode=group["mode"],
                **asked,
            )
        if ratio is None:
            return result
        return select_mask(tensors["scores"], ratio, None, group["mode"], pattern, with_signs=False)[:2]


def _parts(
    p: Tensor, place: int, given: tuple[Tensor | None, ...], tensors: dict[str, Tensor]
) -> Iterator[tuple[int, Any]]:
    """Yield (lower half of the key, (scores, gradient, weight, moments, scales)) for each matrix of a step.

    A plain p is one matrix. If p is spread, each band is one; or all rows here are one, if nothing is rounded.
    """
    matrices, scales = (*given, tensors["exp_avg"], tensors["exp_avg_sq"]), tensors.get("scales")
    if not is_spread(p) or (scales is None and p.dtype == torch.float32):
        if tensors["scores"].numel() or not is_spread(p):
            yield place, (*map(_as_matrix, matrices), scales)
        return
    for i, (band, rows) in enumerate(split_bands(p)):
        of_band = (None if of is None else _as_matrix(of[rows]) for of in matrices)
        yield band << _PLACE_BITS | place, (*of_band, None if scales is None else scales[i])


def _is_captured() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _as_matrix(tensor: Tensor | None) -> Tensor | None:
    # The step is element-wise, so the shape does not matter. Blocks of 256 run over the flattened tensor.
    if tensor is None or tensor.dim() == 2:
        return tensor
    if tensor.dim() == 3:  # keeps rows of a length that kernels are written for
        return tensor.flatten(0, 1)
    return tensor.reshape(1, -1)
