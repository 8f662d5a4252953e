"""A copy of a masked model, spread over processes by FSDP2: each row of each parameter is on one process.

    the model       unchanged: whole in host memory, or on the meta device with its weights in files
    the copy        masked layers are ordinary ones; fully_shard gathers a decoder layer while it runs, then frees it

If the weights are in files, each process reads its rows of one parameter after the other.

The embedding and the head are gathered separately. If they share one weight, each process keeps it whole.
"""

import contextlib
import copy
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from mft.engines.distributed import Processes
from mft.masks.convert import came_from_conv1d, masked_modules, replace_module
from mft.masks.in_place.layer import check_layer
from mft.masks.masked_experts import unmask_experts
from mft.models.causal_lm import Run, decoder_layers, decoder_of, head_of, run_decoder, split_at_head
from mft.models.codes.weight import quantized_weights
from mft.models.weight_files import WeightFiles, weight_files
from mft_kernels import MaskedLayer, MaskedLinear
from mft_kernels.internal import first_row, is_spread, linear_on, rows_here, spread_like

# Gradients in 16 bits are summed in fp32 and rounded once.
_POLICY = MixedPrecisionPolicy(reduce_dtype=torch.float32)


@dataclass(frozen=True)
class SpreadModel:
    """A spread copy of a model, and how it is run.

    weights: by masked layer, DTensors that require grad. units: modules that are gathered as one.
    """

    model: nn.Module
    run: Run
    head: nn.Module
    weights: dict[str, nn.Parameter]
    units: list[FSDPModule]
    own_group: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def sum_gradients(self, wanted: bool) -> None:
        """Set whether the next backward passes sum gradients over processes or keep them for a later pass."""
        for unit in self.units:
            unit.set_requires_gradient_sync(wanted, recurse=False)

    @contextlib.contextmanager
    def whole_head(self) -> Iterator[None]:
        """Keep the head gathered inside the context, as it runs once per chunk of tokens. All processes must enter."""
        if not isinstance(self.head, FSDPModule):
            yield
            return
        self.head.unshard()
        try:
            yield
        finally:
            self.head.reshard()

    def close(self) -> None:
        """Destroy the process group of one process, if spread() made one."""
        self.own_group.close()


def spread(
    model: nn.Module,
    sample: Tensor,
    device: torch.device,
    processes: Processes,
    *,
    split: Callable[[nn.Module, Tensor], tuple[Run, nn.Module]] = split_at_head,
) -> SpreadModel:
    """Spread a copy of model over processes; model itself stays unchanged.

    Args: model: masked or not, on the CPU, or with weights in files (load_unread); sample: tokens (1, T) for a forward
        pass; split: returns how the copy is run. A simulation, which cannot run the model, passes its own.
    Raises: ValueError if a masked layer has hooks of its own or a quantised weight, or fewer rows than processes.
    """
    masked, quantized = masked_modules(model), quantized_weights(model)
    if quantized:
        raise ValueError(
            f"the base must be exact with memory: sharded, got {len(quantized)} layers that are quantised "
            f"({next(iter(quantized))}, ...): load it exactly, or set memory: quantized, with which each process "
            "holds the whole quantised base"
        )
    for name, module in masked.items():
        check_layer(name, module)
        if module.pattern != "matrix":
            raise ValueError(
                f"mask.pattern must be matrix with memory: sharded, whose thresholds are found over parts of a matrix, "
                f"got {module.pattern} in {name}: set memory: layerwise, or leave pattern out"
            )
        if len(module.weight) < processes.count:
            rows = "experts" if module.weight.dim() == 3 else "rows"
            raise ValueError(
                f"memory: sharded takes at most as many processes as each masked layer has {rows}, got "
                f"{processes.count} processes and {len(module.weight)} {rows} in {name}: start fewer processes, or "
                "mask other layers"
            )
    with contextlib.ExitStack() as group:
        if not dist.is_initialized():  # one process, which torchrun did not start
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
            group.callback(dist.destroy_process_group)
        mesh = init_device_mesh(device.type, (processes.count,))
        if weight_files(model) is not None:
            return _spread_from_files(model, sample.to(device), device, mesh, split, group)
        own, places = _ordinary(model, masked)
        run, head = split(own, sample)
        units = _shard(own, run, head, mesh)
        weights = {name: getattr(*place) for name, place in places.items()}
        return SpreadModel(own, run, head, weights, units, own_group=group.pop_all())


@contextlib.contextmanager
def whole_outside_layers(model: nn.Module, units: list[FSDPModule]) -> Iterator[None]:
    """Keep all but the decoder layers gathered inside the context, so that any part of the model can be called."""
    layers = set(decoder_layers(model))
    others = [unit for unit in units if unit not in layers]
    for unit in others:
        unit.unshard()
    try:
        yield
    finally:
        for unit in others:
            unit.reshard()


# ---------------------------------------------------------------------------------------------- private


def _spread_from_files(
    model: nn.Module,
    sample: Tensor,
    device: torch.device,
    mesh: DeviceMesh,
    split: Callable[[nn.Module, Tensor], tuple[Run, nn.Module]],
    group: contextlib.ExitStack,
) -> SpreadModel:
    """Spread a model on the meta device: for run_decoder, and again if it turns out to be run in another way."""
    files, masked = weight_files(model), masked_modules(model)
    assert files is not None, "asked for where there are files"
    turned = {f"{name}.weight" for name, module in masked.items() if came_from_conv1d(module)}
    known: tuple[Run, nn.Module] | None = None
    while True:
        gc.collect()  # the rows of an earlier copy, which FSDP2 keeps in cycles
        own, places = _ordinary(model, masked)
        run, head = known or (run_decoder, head_of(own))
        units = _shard(own, run, head, mesh)
        _read(own, files, device, turned)
        with torch.no_grad():
            run(own, sample)  # FSDP2 takes the first module that runs for the root, and pads the rows
        if known is None:
            with whole_outside_layers(own, units):
                known = split(own, sample)
        if known[0] is run:
            weights = {name: getattr(*place) for name, place in places.items()}
            return SpreadModel(own, run, head, weights, units, own_group=group.pop_all())
        del own, places, units


def _ordinary(model: nn.Module, masked: dict[str, MaskedLayer]) -> tuple[nn.Module, dict[str, tuple[nn.Module, str]]]:
    """Return a copy without masked layers, and where it has their weights."""
    own = _copy(model, masked)
    return own, {name: _make_ordinary(own, name, module) for name, module in masked.items()}


def _copy(model: nn.Module, masked: dict[str, MaskedLayer]) -> nn.Module:
    """Return a copy that shares memory but has its own parameter objects, because FSDP2 moves and replaces those."""
    scores = {id(module.scores): module.scores for module in masked.values()}
    fresh = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters() if id(p) not in scores}
    buffers = {id(buffer): buffer.clone() for buffer in model.buffers()}
    memo: dict[int, Any] = {**fresh, **scores, **buffers}
    return copy.deepcopy(model, memo)


def _make_ordinary(model: nn.Module, name: str, module: MaskedLayer) -> tuple[nn.Module, str]:
    """Replace the masked layer by an ordinary one; return the module that holds its trained weight, and its name."""
    weight = nn.Parameter(module.weight.detach(), requires_grad=True)
    bias = None if module.bias is None else nn.Parameter(module.bias.detach(), requires_grad=False)
    if isinstance(module, MaskedLinear):
        linear = linear_on(weight, bias).train(module.training)
        replace_module(model, name, linear)
        return linear, "weight"
    path, _, part = name.rpartition(".")
    holder: Any = model.get_submodule(path)
    unmask_experts(holder, part, weight, bias)
    return holder, part


def _shard(model: Any, run: Run, head: nn.Module, mesh: DeviceMesh) -> list[FSDPModule]:
    """Apply fully_shard to each decoder layer, to the embedding and the head, and to the rest."""
    root = decoder_of(model) if run is run_decoder else model
    shared = set(head.parameters()) & set(model.get_input_embeddings().parameters())
    parts: list[Any] = list(decoder_layers(model))
    if not shared:
        parts.append(model.get_input_embeddings())
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": _POLICY}
    for part in parts:
        fully_shard(part, reshard_after_forward=True, **options)
    fully_shard(root, ignored_params=shared, **options)
    if run is run_decoder and not shared:
        fully_shard(head, reshard_after_forward=False, **options)
        head.set_reshard_after_backward(False)  # type: ignore[operator]  # whole_head() reshards it
    for p in shared:
        if not p.is_meta:
            p.data = p.data.to(mesh.device_type)
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_gradient_divide_factor(1.0)  # gradients are summed, as the loss is divided already
        unit.set_force_sum_reduction_for_comms(True)
    return units


@torch.no_grad()
def _read(own: nn.Module, files: WeightFiles, device: torch.device, turned: set[str]) -> None:
    """Read this process's rows of every parameter. turned: parameters that the files hold transposed."""
    made: dict[int, nn.Parameter] = {}
    for path, module in own.named_modules():
        for part, p in list(module._parameters.items()):
            if p is None:
                continue
            if id(p) not in made:
                found = _rows(f"{path}.{part}" if path else part, p, files, turned).to(device)
                found = spread_like(found, p, p.shape) if is_spread(p) else found
                made[id(p)] = nn.Parameter(found, requires_grad=p.requires_grad)
            setattr(module, part, made[id(p)])


def _rows(name: str, p: Tensor, files: WeightFiles, turned: set[str]) -> Tensor:
    if not is_spread(p):
        return files.read(name).clone()
    first, count = first_row(p), len(rows_here(p))
    if name in turned:
        return files.read(name).t()[first : first + count].contiguous()
    return files.read(name, first, count)
