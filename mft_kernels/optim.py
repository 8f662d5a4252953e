"""MaskAdamW: AdamW over scores, its moments in 8 bits, through score_step."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from .mask.scores import Scores
from .ops.checks import BLOCK, check_adam, check_mode, check_stepped
from .ops.select import select_each
from .ops.step import score_step
from .page_locked import empty_locked, zeros_locked

MOMENTS = ("8bit", "fp32")


class MaskAdamW(Optimizer):
    """AdamW over score matrices: fp32, or bf16 and int16 fixed point, which are rounded stochastically.

    Either step(), as any optimiser, on every parameter that has a .grad (d_scores, of any shape); or step_one() on one
    matrix from grad_output.T @ x, whose factors weight and sign(scores) the step applies, and whose next mask it finds.

    A parameter's stochastic rounding takes seed * 2^32 + the parameter's place among all parameters, and its step. So
    a run that is resumed from state_dict repeats bit for bit, as long as parameters are given in the same order.

    Args:
        params: tensors or groups of them; float32, bfloat16, or int16 with requires_grad=False (those take step_one).
        lr: score units a step; the paper's 2e-5 moves a score by 0.1 % of the usual scale of 0.02.
        moments: "8bit", 2 bytes a weight and 2 floats a block of 256, or "fp32", which with fp32 scores is
            torch.optim.AdamW(foreach=False) bit for bit.
        mode: "magnitude" or "value"; for step_one.
        seed: in [0, 2^31).
        capturable: count the steps on the device, so that a CUDA graph that captured a step counts on in each replay.
            lr may then be a tensor () on that device, which replays read; a number is that of the capture. Each
            parameter takes a step before the capture, which makes its moments.
    lr, betas, eps, weight_decay, moments, mode, seed and capturable are options of each group.
    Raises: ValueError or TypeError, naming the option. ValueError for parameters that fully_shard has spread.
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
        """Also of an optimiser that was saved before there was ``capturable``."""
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
                if hasattr(p, "full_tensor"):  # a DTensor
                    raise ValueError(
                        f"params must be plain tensors, got a DTensor of shape {tuple(p.shape)} spread over processes: "
                        "8-bit moments share scales, and stochastic rounding counts elements, over the whole "
                        "matrix; take torch.optim.AdamW on fp32 scores, or DistributedDataParallel"
                    )
                check_stepped("params", p)
                if not p.is_contiguous():
                    raise ValueError(f"params must be contiguous, got strides {p.stride()}; use p.contiguous()")
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter with a .grad. Returns what closure returned, or None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, p.grad, None, self.tensors(p), {})
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
    ) -> tuple[Tensor, Tensor] | None:
        """score_step on one of params, (N, K), with the options of its group; its step counter rises by one.

        Args:
            p: also of experts, (E, N, K), of each of which keep_ratio is kept then.
            grad, weight, grad_scale, keep_ratio, threshold: see score_step; grad and weight are of p's shape.
            tensors: copies of tensors(p) on grad's device, updated in place of those at rest.
        Returns: (threshold, packed mask) of the new scores if keep_ratio is given; of experts (E,) and one each.
        Raises: ValueError if p is not one of params.
        """
        asked = {"grad_scale": grad_scale, "keep_ratio": keep_ratio, "threshold": threshold}
        return self._step(p, grad, weight, self.tensors(p) if tensors is None else tensors, asked)

    def tensors(self, p: Tensor) -> dict[str, Tensor]:
        """What a step of p updates, as it rests: "scores" (p itself), "exp_avg", "exp_avg_sq" and, in 8 bits, "scales".

        Moments begin at zero, on p's device and pinned where p is.
        """
        group, _ = self._place(p)
        state = self.state[p]
        if not state:
            zeros = zeros_locked if p.is_pinned() else functools.partial(torch.zeros, device=p.device)
            in_8_bits = group["moments"] == "8bit"
            if _is_captured():
                raise RuntimeError(
                    "params must have taken a step before one is captured into a CUDA graph, got one of shape "
                    f"{tuple(p.shape)} without moments, which each replay would set to 0; take a few steps first"
                )
            state["step"] = torch.zeros((), dtype=torch.int64, device=p.device) if group["capturable"] else 0
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = zeros(p.shape, dtype=torch.uint8 if in_8_bits else torch.float32)
            if in_8_bits:
                state["scales"] = zeros((2, -(-p.numel() // BLOCK)), dtype=torch.float32)
        return {"scores": p, **{name: tensor for name, tensor in state.items() if name != "step"}}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take options and states, which are copied and keep their dtypes: torch's own method casts them to p's.

        Where steps are counted is not taken: it stays as each group has it.
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
                elif isinstance(value, Tensor):
                    copy = empty_locked(value.shape, value.dtype).copy_(value) if p.is_pinned() else None
                    self.state[p][name] = value.to(p.device, copy=True) if copy is None else copy

    def _place(self, p: Tensor) -> tuple[dict[str, Any], int]:
        """p's group, and its place among all parameters."""
        place = 0
        for group in self.param_groups:
            for other in group["params"]:
                if other is p:
                    return group, place
                place += 1
        raise ValueError(f"p must be one of the optimiser's parameters, got another tensor of shape {tuple(p.shape)}")

    def _step(
        self, p: Tensor, grad: Tensor, weight: Tensor | None, tensors: dict[str, Tensor], asked: dict[str, Any]
    ) -> tuple[Tensor, Tensor] | None:
        group, place = self._place(p)
        if _is_captured():
            if not group["capturable"]:
                raise RuntimeError(
                    "capturable must be True where a CUDA graph captures a step, got False: each replay would take the "
                    "number and the rate of this step; use MaskAdamW(..., capturable=True)"
                )
            if isinstance(p, Scores):
                p.in_graph = True  # as after Optimizer.step, for step_one
        if grad.is_sparse:
            raise TypeError("grad must be dense, got a sparse tensor; a score gradient has no zeros to leave out")
        state = self.state[p]
        of_each = asked.get("keep_ratio") if tensors["scores"].dim() == 3 else None
        if of_each is not None:
            asked = asked | {"keep_ratio": None, "threshold": None}
        result = score_step(
            _as_matrix(tensors["scores"].detach()),
            _as_matrix(grad),
            None if weight is None else _as_matrix(weight),
            _as_matrix(tensors["exp_avg"]),
            _as_matrix(tensors["exp_avg_sq"]),
            tensors.get("scales"),
            step=state["step"] + 1,
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            seed=group["seed"] << 32 | place,
            mode=group["mode"],
            **asked,
        )
        state["step"] += 1
        return result if of_each is None else select_each(tensors["scores"].detach(), of_each, group["mode"])


def _is_captured() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _as_matrix(tensor: Tensor) -> Tensor:
    # An element-wise step does not ask for the shape; blocks of 256 run over the flattened tensor.
    if tensor.dim() == 2:
        return tensor
    if tensor.dim() == 3:  # rows of a length for which kernels are written
        return tensor.flatten(0, 1)
    return tensor.reshape(1, -1)
