"""Find the places of a masked layer's weights in a GGUF file, in the order in which transformers reads them.

transformers has one processor per architecture, which puts a tensor's rows where the model has them. It undoes the
permutation of a Llama's q and k, transposes GPT-2's weights, and joins the experts' gate and up into one parameter.
This module assumes nothing about the order: it sends indices through the processor instead of weights, and the result
says where each weight came from.
"""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map
from transformers.pytorch_utils import Conv1D

from mft.files.gguf_file import GgufHeader, GgufTensor
from mft.models.linears import linear_named, weight_name

_EMBEDDING = "token_embd.weight"


class Layout:
    """The tensors of a file by layers of its model. Raises: ValueError if a layer's weight is missing or shared."""

    def __init__(self, path: Path, header: GgufHeader, outline: Any, layers: dict[str, tuple[int, ...]]) -> None:
        """layers: {name of a masked layer: the shape of its weight}; outline: gguf_outline of path."""
        self.path, self._outline, self._layers = path, outline, layers
        config = outline.config
        self._processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(config=config.to_dict())
        self._parameters = {name: self._parameter(name) for name in layers}
        self._names = self._parameter_names(header)
        tensors: dict[str, list[GgufTensor]] = {}
        for tensor in header.tensors.values():
            # The experts' tensors have the suffix .weight, but their parameters do not.
            target = self._names.get(tensor.name) or self._names.get(tensor.name.removesuffix(".weight"))
            tensors.setdefault(str(target), []).append(tensor)
        self.tensors = {name: tensors.get(parameter, []) for name, parameter in self._parameters.items()}
        for name, found in self.tensors.items():
            if not found:
                head = outline.get_output_embeddings()
                if name not in [own for own, module in outline.named_modules() if module is head]:
                    raise ValueError(
                        f"{path}: it must hold the weight of {name}, which is masked, got no tensor from which "
                        "transformers makes it: name the GGUF file of the model that the masks were learned on"
                    )
            if not found or any(tensor.name == _EMBEDDING for tensor in found):
                raise ValueError(
                    f"{path}: {name} must have a tensor of its own to be masked, got one that shares {_EMBEDDING} with "
                    "the embedding, so that the mask would drop weights of the embedding too: leave it out of the masks"
                )

    def elements(self, name: str, dropped: np.ndarray) -> Iterator[tuple[GgufTensor, np.ndarray]]:
        """Yield each tensor with some of a layer's dropped weights (places in the flat weight), and its elements."""
        found = 0
        for tensor in self.tensors[name]:
            *_, width = tensor.shape
            rows = np.arange(1, math.prod(tensor.shape) // width + 1, dtype=np.int32).reshape(*tensor.shape[:-1], 1)
            sent = np.broadcast_to(rows, tensor.shape)
            came = self._process(name, tensor, sent)
            if came is sent:
                self._check_shape(name, tensor.shape)
                found += len(dropped)
                yield tensor, dropped
                continue
            self._check_shape(name, came.shape)
            place = np.unravel_index(dropped, came.shape)
            row = came[place].astype(np.int64) - 1
            column = self._process(name, tensor, np.broadcast_to(np.arange(width, dtype=np.int32), tensor.shape))[place]
            ours = row >= 0  # row numbers are from 1 on; 0, here -1, marks weights that another tensor fills
            found += int(ours.sum())
            yield tensor, np.sort(row[ours] * width + column[ours])
        if found != len(dropped):
            raise ValueError(
                f"{self.path}: every weight of {name} must lie in one tensor, got {found} of {len(dropped)} in "
                f"{', '.join(tensor.name for tensor in self.tensors[name])}: transformers reads them differently"
            )

    def weight(self, name: str, values: dict[str, np.ndarray]) -> np.ndarray:
        """Return a layer's weight. values: the values of its tensors, by tensor name."""
        parts = [self._process(name, tensor, values[tensor.name]) for tensor in self.tensors[name]]
        for part in parts:
            self._check_shape(name, part.shape)
        return sum(parts[1:], start=parts[0])  # where one part has values, the others are 0

    # ------------------------------------------------------------------------------------------ private

    def _parameter(self, name: str) -> str:
        with contextlib.suppress(AttributeError, KeyError):
            parameter = weight_name(self._outline, name)
            self._outline.get_parameter(parameter)
            return parameter
        raise ValueError(
            f"{self.path}: masks must be for layers of this model, a {type(self._outline).__name__}, got one for "
            f"{name!r}: name the GGUF file of the model that they were learned on"
        )

    def _parameter_names(self, header: GgufHeader) -> dict[str, str]:
        """Return {tensor name: parameter name}. It tries the outermost module first: all modules take seconds."""
        try:
            names = get_gguf_hf_weights_map(_Outermost(self._outline), self._processor)
            if not set(self._parameters.values()) <= set(names.values()):
                names = get_gguf_hf_weights_map(self._outline, self._processor)
        except NotImplementedError as error:
            raise ValueError(f"{self.path}: its architecture must be one that gguf names, got {error}") from None
        if "output.weight" not in header.tensors:  # the head is the embedding
            names = {tensor: parameter for tensor, parameter in names.items() if tensor != "output.weight"}
        return names

    def _process(self, name: str, tensor: GgufTensor, values: np.ndarray) -> np.ndarray:
        """Send values, in the tensor's shape, through the processor: return them as they are in the layer's weight."""
        made: dict[str, Any] = {"tensors": {}}  # a processor puts parameters here that it makes of several tensors
        result = self._processor.process(
            weights=values, name=tensor.name, tensor_key_mapping=self._names, parsed_parameters=made
        )
        parameter = self._parameters[name]
        if self._names.get(result.name) == parameter:
            came = result.weights
        elif parameter in made["tensors"]:
            came = made["tensors"][parameter].numpy()
        else:
            raise ValueError(
                f"{self.path}: {tensor.name} must become {parameter}, but transformers turns it into another one"
            )
        is_conv1d = parameter.endswith(".weight") and isinstance(linear_named(self._outline, name), Conv1D)
        return came.T if is_conv1d else came

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if tuple(shape) != self._layers[name]:
            raise ValueError(
                f"{self.path}: {name} must have a weight of {self._layers[name]}, as its mask, got {tuple(shape)}: "
                "name the GGUF file of the model that the masks were learned on"
            )


class _Outermost:
    """The part of a model that get_gguf_hf_weights_map reads, without the modules below it."""

    def __init__(self, model: Any) -> None:
        self.config, self.state_dict = model.config, model.state_dict

    def named_children(self) -> list[tuple[str, nn.Module]]:
        return []
