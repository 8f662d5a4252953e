"""Scores: a Parameter that can tell whether it was written, so that a mask is selected once per change.

docs/explanation/concepts.md lists the writes that are seen, and those that need outdate(). A state of scores consists
of
- their version, which PyTorch raises for an in-place operation on them or on a view of them;
- the last access to ``.data``, as a write through it raises no version;
- how many steps optimisers have made, as some write through pointers;
- the address of the memory and, on a CPU, a sample of the contents.
"""

import itertools
from ctypes import c_char
from typing import Any, NamedTuple

import numpy
from torch import Tensor, nn
from torch.fx.experimental import proxy_tensor
from torch.optim.optimizer import _foreach_supported_types

from ..ops.route import treat_as_plain

# A sample reads so many runs of so many words of 8 bytes, a run a line of the cache. 64 words each in a line and a page
# of its own took 16 us from memory (Xeon, 576 x 576 fp32, which one token multiplies in 90 us), these take 3.
_RUNS, _RUN = 8, 8
_accesses = itertools.count(1)  # next() counts right in several threads, += does not
_data: Any = Tensor.data  # the property


class Scores(nn.Parameter):
    """A score matrix (N, K) of a MaskedLinear; an nn.Parameter in all else, and pickled as one."""

    memo: Any = None  # what masking.py remembers of a state
    ahead: Any = None  # a memo that nobody has asked for yet; see companions.py
    stepped: Any = None  # how an optimiser left them on an accelerator; see companions.py
    in_graph = False  # whether a CUDA graph that was captured may write them when it is replayed
    accessed = 0  # the last access to .data

    def __new__(cls, data: Tensor | None = None, requires_grad: bool = True) -> "Scores":
        # As type(parameter)(parameter): nn.Parameter takes plain tensors alone.
        return super().__new__(cls, Tensor.detach(data) if type(data) is Scores else data, requires_grad)

    @property
    def data(self) -> Tensor:
        self.accessed = next(_accesses)
        return _data.__get__(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        self.accessed = next(_accesses)
        _data.__set__(self, value)

    def __getstate__(self) -> dict[str, Any]:
        ours = ("memo", "ahead", "stepped", "in_graph", "accessed")
        return {name: value for name, value in self.__dict__.items() if name not in ours}


# By exact type, so that optimisers and make_fx treat scores as they treat any parameter. There is no public way; torch
# enters DTensor in the optimisers' list in the same way.
_foreach_supported_types.append(Scores)  # type: ignore[arg-type]
proxy_tensor.HANDLED_TYPES = (*proxy_tensor.HANDLED_TYPES, Scores)  # type: ignore[assignment]
treat_as_plain(Scores)


def watch(parameter: Tensor) -> None:
    """Make an nn.Parameter of scores a Scores, in place: optimisers and hooks that have it keep it."""
    if type(parameter) is nn.Parameter:
        parameter.__class__ = Scores


class State(NamedTuple):
    """A state of scores: no write has been seen for as long as still() says so."""

    version: int
    accessed: int
    steps: int
    address: int
    words: numpy.ndarray  # of the scores' memory, some of them
    sample: bytes  # what they were


_steps = 0  # of any optimiser


def state(scores: Scores) -> State | None:
    """The state of the scores now; None if writes into them cannot be seen."""
    if scores.is_inference() or scores.in_graph:  # an inference tensor has no version
        return None
    words = _some_words(scores)
    return State(scores._version, scores.accessed, _steps, scores.data_ptr(), words, words.tobytes())


def still(scores: Scores, state: State) -> bool:
    """Whether the scores are in a state that they were in. In every forward, so it asks as little as will do."""
    return (
        scores._version == state.version
        and scores.accessed == state.accessed
        and state.steps == _steps
        and scores.data_ptr() == state.address  # before the words, which are gone with their memory
        and state.words.tobytes() == state.sample
    )


def forget_states() -> None:
    """Let no state of any scores hold any more."""
    global _steps
    _steps += 1


def _some_words(scores: Scores) -> numpy.ndarray:
    """Some of the words of scores on a CPU, all bytes where they are few; read in place, and holding nothing."""
    if not scores.is_cpu or scores.numel() == 0:
        return numpy.empty(0)
    # Expanded scores have fewer bytes of memory than elements.
    in_storage = scores.untyped_storage().nbytes() - int(scores.storage_offset()) * scores.itemsize
    size = min(scores.numel() * scores.itemsize, in_storage)
    memory = memoryview((c_char * size).from_address(scores.data_ptr()))
    lines = size // (8 * _RUN)
    if lines < 2 * _RUNS:
        return numpy.frombuffer(memory, numpy.uint8)
    # An odd step: one that divides a row's length would read the same few columns of every row.
    step = lines // _RUNS - 1 | 1
    words = numpy.frombuffer(memory, numpy.int64, _RUNS * step * _RUN)
    return words.reshape(_RUNS, step * _RUN)[:, :_RUN]
