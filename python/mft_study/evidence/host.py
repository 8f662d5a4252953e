"""Where a result was computed: host, processor, its instruction sets, versions."""

import functools
import platform
import socket
from dataclasses import dataclass
from importlib.metadata import version

import torch

from mft_kernels import __version__
from mft_kernels.internal import this_processor


@dataclass(frozen=True)
class Host:
    """Where a result was computed.

    instructions: the best instruction sets of our and of torch's kernels, or the GPU's compute capability. versions: of
    each package that may change a result.
    """

    host: str
    processor: str
    instructions: str
    versions: dict[str, str]

    @property
    def kind(self) -> str:
        """The kind of processor, which results may depend on through rounding."""
        return f"{self.processor} ({self.instructions})"


@functools.cache
def this_host() -> Host:
    """Return the host of this process."""
    versions = {
        "mft_kernels": __version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
        "torch": torch.__version__,  # package metadata lack the build, such as +cpu
        "transformers": version("transformers"),
    }
    if torch.cuda.is_available():
        capability = "sm_{}{}".format(*torch.cuda.get_device_capability())
        return Host(socket.gethostname(), torch.cuda.get_device_name(), capability, versions)
    processor = this_processor()
    best = next(iter(processor.features), "no instruction set of our kernels")
    instructions = f"{best}, torch {torch.backends.cpu.get_cpu_capability()}"
    return Host(socket.gethostname(), str(processor), instructions, versions)
