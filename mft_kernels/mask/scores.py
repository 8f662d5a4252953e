"""Scores: a Parameter that can tell whether it was written, so that a mask is selected once per change.

docs/explanation/concepts.md lists the writes that are seen, and those that need outdate(). A state of scores consists
of
- their version, which PyTorch raises for an in-place operation on them or on a view of them;
- the last access to ``.data``, because a write through it does not raise the version;
- how many steps optimisers have made, because some write through pointers;
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

# A sample reads _RUNS runs of _RUN words of 8 bytes; each run is one cache line. This takes 3 us from memory. 64 words
# that each lie in another cache line and page took 16 us (Xeon, 576 x 576 fp32, where one token's product takes 90 us).
_RUNS, _RUN = 8, 8
_accesses = itertools.count(1)  # next() counts correctly in several threads, += does not
_data: Any = Tensor.data  # the property


class Scores(nn.Parameter):
    """A score matrix (N, K) of a MaskedLinear. In all else it is an nn.Parameter, and it is pickled as one."""

    memo: Any = None  # what masking.py remembers of a state
    ahead: Any = None  # a memo that nobody has asked for yet; see companions.py
    stepped: Any = None  # how an optimiser left them on an accelerator; see companions.py
    in_graph = False  # whether a CUDA graph that was captured may write them when it is replayed
    accessed = 0  # the last access to .data

    def __new__(cls, data: Tensor | None = None, requires_grad: bool = True) -> "Scores":
        # For callers of type(parameter)(parameter): nn.Parameter takes only plain tensors.
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


# torch compares exact types here. With these entries, optimisers and make_fx treat scores like any parameter. There is
# no public way; torch itself adds DTensor to the optimisers' list in the same way.
_foreach_supported_types.append(Scores)  # type: ignore[arg-type]
proxy_tensor.HANDLED_TYPES = (*proxy_tensor.HANDLED_TYPES, Scores)  # type: ignore[assignment]
treat_as_plain(Scores)


def watch(parameter: Tensor) -> None:
    """Turn an nn.Parameter of scores into Scores in place, so that optimisers and hooks keep their reference."""
    if type(parameter) is nn.Parameter:
        parameter.__class__ = Scores


class State(NamedTuple):
    """A state of scores. As long as still() is true for it, no write has been seen."""

    version: int
    accessed: int
    steps: int
    address: int
    words: numpy.ndarray  # a view of some words of the scores' memory
    sample: bytes  # what these words were


_steps = 0  # of all optimisers together


def state(scores: Scores) -> State | None:
    """Return the current state of the scores; None if writes to them cannot be seen."""
    if scores.is_inference() or scores.in_graph:  # an inference tensor has no version
        return None
    words = _some_words(scores)
    return State(scores._version, scores.accessed, _steps, scores.data_ptr(), words, words.tobytes())


def still(scores: Scores, state: State) -> bool:
    """Return whether the scores are still in this state. It runs in every forward, so it checks little."""
    return (
        scores._version == state.version
        and scores.accessed == state.accessed
        and state.steps == _steps
        and scores.data_ptr() == state.address  # before the words: other memory may have replaced theirs
        and state.words.tobytes() == state.sample
    )


def forget_states() -> None:
    """Make every state of all scores invalid."""
    global _steps
    _steps += 1


def _some_words(scores: Scores) -> numpy.ndarray:
    """Return a view of some words of scores on a CPU, or of all bytes if few. It does not keep memory alive."""
    if not scores.is_cpu or scores.numel() == 0:
        return numpy.empty(0)
    # Expanded scores have less memory than elements.
    in_storage = scores.untyped_storage().nbytes() - int(scores.storage_offset()) * scores.itemsize
    size = min(scores.numel() * scores.itemsize, in_storage)
    memory = memoryview((c_char * size).from_address(scores.data_ptr()))
    lines = size // (8 * _RUN)
    if lines < 2 * _RUNS:
        return numpy.frombuffer(memory, numpy.uint8)
    # The step is odd: a step that divides a row's length would read the same few columns of every row.
    step = lines // _RUNS - 1 | 1
    words = numpy.frombuffer(memory, numpy.int64, _RUNS * step * _RUN)
    return words.reshape(_RUNS, step * _RUN)[:, :_RUN]
