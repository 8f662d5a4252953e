"""Whether a layer that calls itself something else computes what nn.Linear does: its code is tried beside F.linear.

Tried is a twin of the layer, with its class and settings and random weights of at most 32 x 32: in training and in eval
mode, with gradients and without, on rows whose sizes lie far apart (so that bounds show), in fp64 (so that casts show)
and in the layer's dtype, on its device; of a layer without values, on the meta device or fake, on the CPU.

And it is watched. Tensors and modules that its forward reads besides weight and bias, and objects that nobody can
compare, are more than a linear layer has, whatever comes out today. A number that it reads is changed: if the values
move with it, it is a factor that happens to be 1, a bound or a rate. Flags, texts and numbers that choose are settings,
which are taken as they are.

What a forward does hangs on what it reads, so an answer holds for all layers of the class that have the same there: it
is found once, not once a layer.
"""

import contextlib
import inspect
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

_MOST = 32  # rows and columns of the twin's weight
_LEADING = (2, 3), (4,), (1, 1)  # dimensions of x before its last
_ROUNDINGS = 8  # of the dtype, relative to the sum of magnitudes: another order of sums, or a bias that is added apart
_SPREAD = 2.0**20, 2.0**5  # of rows, up and down; the second in fp16, which ends at 65504
_SETTINGS = bool, int, float, str, type(None), torch.dtype, torch.device
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_REGISTRIES = "_parameters", "_buffers", "_modules"

# By code, dtype, device and having a bias: what was read, as tokens by name, and the answer.
_answers: dict[tuple, list[tuple[dict[str, Any], str | None]]] = {}


def why_not_linear(module: nn.Module) -> str | None:
    """What module, which has a parameter weight (N, K), does that F.linear does not; None if nothing was found.

    module is not called, nor changed; neither are random states.
    """
    if any(getattr(module, name, 0) is not module._parameters.get(name) for name in ("weight", "bias")):
        return "its weight is no parameter, or its bias neither a parameter nor None"
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    assert weight is not None
    if bias is not None and bias.shape != weight.shape[:1]:
        return f"its bias is {tuple(bias.shape)} beside a weight {tuple(weight.shape)}"
    device = torch.device("cpu") if weight.is_meta or isinstance(weight.data, FakeTensor) else weight.device
    code: Any = type(module)
    key = code, code.forward, code.__call__, weight.dtype, device.type, bias is None
    known = _answers.setdefault(key, [])
    for reads, why in known:
        if all(_token(module, name) == token for name, token in reads.items()):
            return why
    trial = _Trial(module, weight.dtype, device)
    why = trial.outcome()
    known.append(({name: _token(module, name) for name in trial.reads}, why))
    return why


# ---------------------------------------------------------------------------------------------- private


class _More(Exception):
    """What a layer does that F.linear does not."""


class _Trial:
    """Of one layer; ``reads`` are the names that its forward has asked it for."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        self.module: Any = module
        self.dtype, self.device = dtype, device
        self.has_bias = module._parameters.get("bias") is not None
        self.sizes = {size: min(size, _MOST) for size in module._parameters["weight"].shape}  # type: ignore[union-attr]
        self.reads: set[str] = set()
        self.more: list[str] = []  # an exception could be caught by the forward that is tried
        self.numbers = torch.Generator().manual_seed(0)
        self.watched = _watched(type(module), self.reads, self.more, _beyond_linear(module))

    def outcome(self) -> str | None:
        try:
            with _undisturbed(self.device):
                wide = torch.float64 if self.device.type != "mps" else torch.float32
                for dtype in dict.fromkeys((wide, self.dtype)):
                    for training in (False, True):
                        for leading in _LEADING:
                            self._try(dtype, training, leading)
                self._try_numbers(wide)
        except _More as more:
            return str(more)
        return None

    def _try(self, dtype: torch.dtype, training: bool, leading: tuple[int, ...]) -> None:
        x, weight, bias = self._draw(dtype, leading)
        when = f"in {'training' if training else 'eval'} mode, in {str(dtype).removeprefix('torch.')}"
        leaves = [x, weight] if bias is None else [x, weight, bias]
        with torch.enable_grad():
            expected = F.linear(x, weight, bias)
            y = self._call(self._twin(weight, bias, training=training), x)
            self._compare("its forward gives", y, expected, _magnitude(x, weight, bias), when)
            grad = _random(expected.shape, self.numbers).to(expected)
            d_expected = torch.autograd.grad(expected, leaves, grad)
            if not y.requires_grad:
                raise _More(f"its forward gives no gradient {when}")
            try:
                d_y = torch.autograd.grad(y, leaves, grad, allow_unused=True)
            except Exception as error:  # noqa: BLE001  (of code that is not ours, what it raises is the finding)
                raise _More(f"its backward pass raises {type(error).__name__}: {error}") from None
        wide = [None if leaf is None else leaf.detach().double().abs() for leaf in (x, weight, bias, grad)]
        sizes = _gradient_magnitudes(*wide)
        for name, found, d, size in zip(("x", "weight", "bias"), d_y, d_expected, sizes):
            if found is None:
                raise _More(f"its forward gives {name} no gradient {when}")
            self._compare(f"its gradient of {name} is", found, d, size, when)
        with torch.no_grad():
            x = x.detach().clone()
            x.view(-1, x.shape[-1])[1:2] = float("nan")  # which some take away
            before = x.clone()
            y = self._call(self._twin(weight, bias, training=training), x)
            size = _magnitude(x.nan_to_num(), weight, bias)
            self._compare("without gradients its forward gives", y, F.linear(before, weight, bias), size, when)
            if not torch.equal(x.nan_to_num(), before.nan_to_num()):
                raise _More("its forward writes into its input")

    def _try_numbers(self, dtype: torch.dtype) -> None:
        """Whether values move with a number that forward reads."""
        shape = self.module._parameters["weight"].shape
        for name in sorted(self.reads):
            number = _held(self.module, name)
            if type(number) not in (int, float) or number in shape:
                continue
            for training in (False, True):
                x, weight, bias = self._draw(dtype, _LEADING[0])
                expected = F.linear(x, weight, bias)
                for other in (number + 1, 0):  # bounds may be as large as they like, or infinite
                    try:
                        y = self._call(self._twin(weight, bias, training=training, **{name: other}), x)
                    except _More:  # the setting of another kind of layer, which reads what this one lacks
                        continue
                    same_shape = y.shape == expected.shape
                    if same_shape and _farthest(y, expected, _magnitude(x, weight, bias)) is not None:
                        raise _More(f"its forward computes with {name}, which is {number} now")

    def _call(self, twin: nn.Module, x: Tensor) -> Tensor:
        self.more.clear()
        try:
            y = twin(x)
        except Exception as error:  # noqa: BLE001  (of code that is not ours, what it raises is the finding)
            raise _More(self.more[0] if self.more else f"its forward raises {type(error).__name__}: {error}") from None
        if self.more:
            raise _More(self.more[0])
        if type(y) is not Tensor:
            raise _More(f"its forward returns a {type(y).__name__}")
        return y

    def _compare(self, what: str, found: Tensor, expected: Tensor, size: Tensor, when: str) -> None:
        if found.shape != expected.shape:
            raise _More(f"{what} {tuple(found.shape)} where F.linear has {tuple(expected.shape)}, {when}")
        if found.dtype != expected.dtype or found.device != expected.device:
            raise _More(
                f"{what} {found.dtype} on {found.device} where F.linear has {expected.dtype} on {expected.device}"
            )
        far = _farthest(found, expected, size)
        if far is not None:
            numbers = found[far].item(), expected[far].item()
            digits = next((n for n in (6, 9) if f"{numbers[0]:.{n}g}" != f"{numbers[1]:.{n}g}"), 17)
            raise _More(f"{what} {numbers[0]:.{digits}g} where F.linear has {numbers[1]:.{digits}g}, {when}")

    def _twin(self, weight: nn.Parameter, bias: nn.Parameter | None, **changes: Any) -> nn.Module:
        twin: Any = object.__new__(self.watched)
        held = object.__getattribute__(twin, "__dict__")
        for name, value in vars(self.module).items():
            held[name] = dict(value) if name in _REGISTRIES else value
            if type(value) is int and value in self.sizes:
                held[name] = self.sizes[value]  # in_features, and what else a class calls them
        held["_parameters"] |= {"weight": weight, "bias": bias}
        held |= changes
        return twin

    def _draw(self, dtype: torch.dtype, leading: tuple[int, ...]) -> tuple[Tensor, nn.Parameter, nn.Parameter | None]:
        """x (..., K) whose rows are small, large and ordinary in turn, weight and bias; all want gradients."""
        n, k = (self.sizes[size] for size in self.module._parameters["weight"].shape)
        count, spread = math.prod(leading), _SPREAD[dtype == torch.float16]
        sizes = torch.tensor([spread, 1.0, 1 / spread], device="cpu").repeat(count)[:count]
        x = (_random((*leading, k), self.numbers) * sizes.view(*leading, 1)).to(self.device, dtype)
        weight, bias = _random((n, k), self.numbers), _random((n,), self.numbers)
        made = [nn.Parameter(tensor.to(self.device, dtype)) for tensor in (weight, bias)]
        return x.requires_grad_(), made[0], made[1] if self.has_bias else None


def _watched(kind: Any, reads: set[str], more: list[str], beyond: dict[str, str]) -> type:
    """The class, which notes what its instances are asked for; what lies beyond a linear layer is not handed out."""

    def refuse(what: str) -> None:
        more.append(what)
        raise _More(what)

    class Watched(kind):
        def __getattribute__(self, name: str) -> Any:
            if name not in _OF_EVERY_MODULE and not name.startswith("__"):
                reads.add(name)
            if name in beyond:
                refuse(beyond[name])
            return super().__getattribute__(name)

        def __setattr__(self, name: str, value: Any) -> None:
            refuse(f"its forward sets {name}")

    return Watched


def _beyond_linear(module: nn.Module) -> dict[str, str]:
    """What module holds by name that nn.Linear does not have, as the sentence that its forward reads it."""
    found = {}
    for registry in _REGISTRIES:
        for name, value in getattr(module, registry).items():
            if value is not None and (registry, name) not in (("_parameters", "weight"), ("_parameters", "bias")):
                found[name] = found[registry] = f"its forward reads {name}, a {type(value).__name__} of its own"
    for name, value in vars(module).items():
        if name not in _OF_EVERY_MODULE and not isinstance(value, _SETTINGS):
            found[name] = f"its forward reads {name}, a {type(value).__name__} of its own"
    return found


_ABSENT = object()


def _held(module: nn.Module, name: str) -> Any:
    """What an instance or its class has by this name, of what is no tensor and no module."""
    return vars(module).get(name, inspect.getattr_static(type(module), name, _ABSENT))


def _token(module: nn.Module, name: str) -> Any:
    """What module has there, as far as it decides what a forward does: layers with equal tokens are treated alike."""
    for registry in _REGISTRIES:
        if name in getattr(module, registry):
            return registry, type(getattr(module, registry)[name])
    value = _held(module, name)
    n, k = module._parameters["weight"].shape  # type: ignore[union-attr]
    if type(value) is int and value in (n, k):
        return "a dimension", value == n, value == k
    return (type(value), value) if isinstance(value, _SETTINGS) else type(value)


def _random(shape: Any, generator: torch.Generator) -> Tensor:
    """In values that every dtype holds, so that all are tried on the same numbers."""
    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32).bfloat16().float()


def _magnitude(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """|x| @ |weight|.T + |bias| in fp64, on the CPU: what rounding of a sum is measured by."""
    x, weight = x.detach().cpu().double().abs(), weight.detach().cpu().double().abs()
    return F.linear(x, weight, None if bias is None else bias.detach().cpu().double().abs())


def _gradient_magnitudes(x: Any, weight: Any, bias: Any, grad: Any) -> list[Tensor]:
    """The same of the gradients of x, weight and bias."""
    grad, x, weight = grad.cpu(), x.cpu(), weight.cpu()
    rows = grad.reshape(-1, grad.shape[-1])
    return [grad @ weight, rows.T @ x.reshape(-1, x.shape[-1]), rows.sum(0)]


def _farthest(found: Tensor, expected: Tensor, size: Tensor) -> tuple[int, ...] | None:
    """Where found is farthest from expected, if farther than rounding explains."""
    wide, exact = found.detach().cpu().double(), expected.detach().cpu().double()
    off = (wide - exact).abs() / size.clamp(min=torch.finfo(torch.float64).tiny)
    off = torch.where(wide.isnan() & exact.isnan() | (wide == exact), 0.0, off).nan_to_num(torch.inf)
    at = int(off.argmax())
    if off.view(-1)[at] <= _ROUNDINGS * torch.finfo(expected.dtype).eps:
        return None
    return tuple(int(index) for index in torch.unravel_index(torch.tensor(at), off.shape))


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Whatever the caller is under (autocast, fake tensors, inference mode) does not hold, and random states stay."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(unset_fake_temporarily())
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield
