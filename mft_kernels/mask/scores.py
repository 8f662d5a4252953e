"""Scores: a Parameter that sees most writes into it, so that its mask is selected anew after them (docs/concepts.md).

PyTorch counts in-place operations in a tensor's version. Writes through .data, numpy, dlpack, a storage, collectives,
another tensor on the same memory or another process do not count there. So a state of the scores is told by more:

- what hands out the memory, or an alias with a version of its own (``.data``, ``.numpy()``, ...), counts as a change;
- while anything else lives on the memory (an alias, an array, a storage object, another process), and where the
  memory came from elsewhere (torch.from_numpy), there is no state to rely on, and each forward selects anew;
- torch.compile announces a graph's writes before it runs: an announced version is no state to rely on either;
- on a CPU, a sample of the contents is compared, for whoever writes whole matrices through a pointer.

What remains unseen, and needs outdate(scores): parts written through a raw pointer, whole matrices on a GPU so, or by a
replayed CUDA graph that the scores' own layer took no part in.
"""

import itertools
import logging
import sys
from ctypes import c_char
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor, nn
from torch.fx.experimental import proxy_tensor
from torch.optim.optimizer import Optimizer, _foreach_supported_types

from ..ops.route import increment_version, treat_as_plain

logger = logging.getLogger("mft_kernels")

# A sample reads so many runs of so many words of 8 bytes, a run a line of the cache. 64 words each in a line and a page
# of its own took 16 us from memory (Xeon, 576 x 576 fp32, which one token multiplies in 90 us), these take 3.
_RUNS, _RUN = 8, 8
_TOLD_AFTER = 64  # selections in a row for want of a state: more than an alias that is on its way out costs
_tickets = itertools.count(1)  # one each time that memory is handed out, in whatever thread
_OURS = (  # attributes; a pickle leaves them out
    *("memo", "ahead", "asked_on", "left", "in_graph"),
    *("_handed_out", "_announced", "_unknown"),
)

# Methods that hand out the memory itself, or an alias from which it is one step there: what is done to an alias shows
# in the version, which it shares, but an alias has .data and .numpy() of its own.
# fmt: off
_ALIASING = (
    "__array__", "__dlpack__", "__getitem__", "__iter__", "_typed_storage", "adjoint", "as_strided", "chunk",
    "contiguous", "data_ptr", "diagonal", "dsplit", "expand", "expand_as", "flatten", "hsplit", "movedim", "moveaxis",
    "narrow", "numpy", "permute", "ravel", "reshape", "reshape_as", "select", "share_memory_", "split",
    "split_with_sizes", "squeeze", "storage", "swapaxes", "swapdims", "t", "tensor_split", "to", "transpose", "type",
    "unbind", "unflatten", "unfold", "unsqueeze", "untyped_storage", "view", "view_as", "vsplit",
)
# fmt: on
_data: Any = Tensor.data  # the property
_ARRAYS = ("__array__", "__dlpack__", "numpy")
_ALIASING_PROPERTIES = ("T", "mT", "H", "mH", "__cuda_array_interface__")


class Scores(nn.Parameter):
    """A score matrix (N, K) of a MaskedLinear; an nn.Parameter in all else, and pickled as one."""

    memo: Any = None  # what masking.py remembers of a state
    ahead: Any = None  # a memo that nobody has asked for yet; see companions.py
    asked_on: Any = None  # the stream on which a mask was last asked for; None after one that was selected in vain
    left: Any = None  # (version, _handed_out, companions.Step): how an optimiser left them on an accelerator
    in_graph = False  # whether a CUDA graph that was captured may write them when it is replayed

    _handed_out = 0
    _announced: tuple[int, int] | None = None
    _unknown = 0  # how often in a row there was no state

    @property
    def data(self) -> Tensor:
        self._handed_out = next(_tickets)
        return _data.__get__(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        self._handed_out = next(_tickets)
        _data.__set__(self, value)

    def detach(self) -> Tensor:
        caller, alias = sys._getframe(1).f_globals.get("__name__"), Tensor.detach(self)
        if caller != "torch.utils.checkpoint":  # which keeps it for the backward pass, and writes nothing
            self._handed_out = next(_tickets)
        if caller == "torch.nn.parameter":  # nn.Parameter(scores), which asks for the type that it detaches
            alias.__class__ = Scores
        return alias

    def __reduce_ex__(self, protocol: Any) -> Any:
        self._handed_out = next(_tickets)  # another process may get the memory itself
        plain = nn.Parameter(Tensor.detach(self), self.requires_grad)
        plain.__dict__.update({name: value for name, value in self.__dict__.items() if name not in _OURS})
        return plain.__reduce_ex__(protocol)


def _handing_out(name: str) -> Any:
    inherited = getattr(Tensor, name)

    def method(self: Scores, *args: Any, **kwargs: Any) -> Any:
        self._handed_out = next(_tickets)
        # An array holds the tensor that it came from: it takes an alias, whose life state() sees. Scores that ask for a
        # gradient become no array.
        lent = Tensor.detach(self) if name in _ARRAYS and not self.requires_grad else self
        return inherited(lent, *args, **kwargs)

    method.__name__, method.__doc__ = name, inherited.__doc__
    return method


def _handing_out_property(name: str) -> property:
    inherited = getattr(Tensor, name)

    def read(self: Scores) -> Any:
        self._handed_out = next(_tickets)
        return inherited.__get__(self)

    return property(read, doc=inherited.__doc__)


for _name in _ALIASING:
    setattr(Scores, _name, _handing_out(_name))
for _name in _ALIASING_PROPERTIES:
    setattr(Scores, _name, _handing_out_property(_name))

# By exact type, so that optimisers and make_fx treat scores as they treat any parameter; torch enters DTensor in the
# optimisers' list in the same way.
_foreach_supported_types.append(Scores)  # type: ignore[arg-type]
proxy_tensor.HANDLED_TYPES = (*proxy_tensor.HANDLED_TYPES, Scores)  # type: ignore[assignment]
treat_as_plain(Scores)


def watch(parameter: Tensor) -> None:
    """Make an nn.Parameter of scores a Scores, in place: optimisers and hooks that have it keep it."""
    if type(parameter) is nn.Parameter:
        parameter.__class__ = Scores


class State(NamedTuple):
    """A state of scores: nothing has written into them for as long as still() says so."""

    version: int
    steps: int
    handed_out: int
    address: int
    words: numpy.ndarray  # of the scores' memory, some of them
    sample: bytes  # what they were


_steps = 0  # of any optimiser


def state(scores: Scores) -> State | None:
    """The state of the scores now; None where nothing could tell that it has changed."""
    if scores.is_inference():  # which has no version
        return None
    storage = Tensor.untyped_storage(scores)
    if (
        torch._C._storage_Use_Count(storage._cdata) != _ALONE
        or sys.getrefcount(storage) != _ALONE_NAMES
        or scores._announced == (scores._version, _steps)
        or scores.in_graph
        or not storage.resizable()  # memory that came from elsewhere, where its owner may write
        or (not scores.is_cuda and storage.is_shared())
    ):
        scores._unknown += 1
        if scores._unknown == _TOLD_AFTER:
            logger.warning(
                "the mask of scores %s is selected in each of many forwards, as others can write into their memory "
                "(another tensor, array or process holds it, or a CUDA graph writes it): free what holds it, or set "
                "scores.data to a clone()",
                tuple(scores.shape),
            )
        return None
    scores._unknown = 0
    address, words = Tensor.data_ptr(scores), _some_words(scores)
    return State(scores._version, _steps, scores._handed_out, address, words, words.tobytes())


def still(scores: Scores, state: State) -> bool:
    """Whether the scores are in a state that they were in. In every forward, so it asks as little as will do."""
    storage = Tensor.untyped_storage(scores)
    return (
        scores._version == state.version
        and scores._handed_out == state.handed_out
        and state.steps == _steps
        and torch._C._storage_Use_Count(storage._cdata) == _ALONE
        and sys.getrefcount(storage) == _ALONE_NAMES  # here, not in a function: its call may hold it once more
        and Tensor.data_ptr(scores) == state.address
        and state.words.tobytes() == state.sample
    )


def optimiser_stepped(stepped: Optimizer | None = None, *_: Any) -> None:
    """Forget all states: optimisers write through pointers, too."""
    global _steps
    _steps += 1
    if stepped is not None and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        for parameter in (p for group in stepped.param_groups for p in group["params"]):
            if type(parameter) is Scores:
                parameter.in_graph = True


def _count_of_one() -> tuple[int, int]:
    tensor = torch.empty(1)
    storage = Tensor.untyped_storage(tensor)
    return torch._C._storage_Use_Count(storage._cdata), sys.getrefcount(storage)


_ALONE, _ALONE_NAMES = _count_of_one()  # which torch and Python count in their own ways


def _some_words(scores: Scores) -> numpy.ndarray:
    """Some of the words of scores on a CPU, all bytes where they are few; read in place, and holding nothing."""
    size = scores.numel() * scores.itemsize if scores.is_cpu else 0
    if size == 0:
        return numpy.empty(0)
    memory = memoryview((c_char * size).from_address(Tensor.data_ptr(scores)))
    lines = size // (8 * _RUN)
    if lines < 2 * _RUNS:
        return numpy.frombuffer(memory, numpy.uint8)
    # An odd step: one that divides a row's length would read the same few columns of every row.
    step = lines // _RUNS - 1 | 1
    words = numpy.frombuffer(memory, numpy.int64, _RUNS * step * _RUN)
    return words.reshape(_RUNS, step * _RUN)[:, :_RUN]


# ---------------------------------------------------------------------------- what torch.compile announces


def _announcing(tensors: Any) -> None:
    """torch.autograd.graph.increment_version, of which follows that a write may be to come.

    AOTAutograd calls it for the inputs that a compiled graph writes to, before it runs the graph: a mask selected
    within has the new version and the old scores.
    """
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    increment_version(tensors)
    for tensor in tensors:
        if type(tensor) is Scores:
            tensor._announced = (tensor._version, _steps)


torch.autograd.graph.increment_version = _announcing  # type: ignore[assignment]
