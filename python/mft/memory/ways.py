"""The memory modes ("ways") of a training step, one class each: the base it needs, the bytes it holds and moves.

A mode's step has phases. The classes list the tensors of plain.py, in_place_engine.py, layer_engine.py, layerwise.py
and sharded/ in engines/. Pure Python.
"""

from dataclasses import replace

from mft.memory.sizes import RunSizes, Sizes
from mft.memory.workload import Workload
from mft.number_formats import SCORE_FORMATS
from mft.quantizers import DEFAULT

# Boundaries on the device in addition to the layer's own input and its output's gradient. Resident: the next input.
# Layerwise: the next input, the next gradient, and the one that is being copied to the host.
_RESIDENT_BOUNDARIES, _LAYERWISE_BOUNDARIES = 1, 3

_REDUCED = 4  # bytes per gradient element that processes sum in sharded: fp32


class Way:
    """A memory mode, with the defaults of most modes."""

    name: str
    over_exact = True  # whether it trains over exact weights
    over_codes = False  # whether it trains over a quantised base
    offloads = True  # whether scores, moments and the boundaries between layers are kept in host memory
    holds_all_rows = False  # whether its memory grows with a step's micro-batches
    spreads = False  # whether it spreads a model over processes
    is_for_auto = True  # whether memory: auto considers it

    def base(self, asked: str | None) -> str | None:
        """Return the format of the base that the mode uses if this one is asked for; None for exact weights."""
        if not self.over_codes:
            return None
        return asked if asked is not None or self.over_exact else DEFAULT

    def adapt(self, workload: Workload) -> Workload:
        """Return the workload in this mode: with a quantised base if the mode needs one, without if it has none."""
        quantization = self.base(workload.quantization)
        masked = workload.quantize_masked and quantization is not None
        return replace(workload, memory=self.name, quantization=quantization, quantize_masked=masked)

    def obstacle(self, workload: Workload, quantized: int) -> str | None:
        """Return why the engines refuse the mode with this number of quantised linears, or None."""
        if workload.quantization is not None and not self.over_codes:
            return f"quantization={workload.quantization} asks for a quantised base"
        if workload.batches_at_once is not None and not self.holds_all_rows:
            return f"it runs one batch at a time, and batches_at_once={workload.batches_at_once} asks for layerwise"
        if workload.fixed_threshold and not SCORE_FORMATS[workload.scores].has_gradient:
            return f"{workload.scores} scores have no fixed threshold"
        if not quantized and (workload.quantization is not None or not self.over_exact):
            return "every linear layer is masked, so nothing would be quantised without quantize_masked"
        return None

    def phases(self, run: RunSizes) -> dict[str, Sizes]:
        """Return the bytes that the device holds in each phase of a step, by kind."""
        raise NotImplementedError

    def host(self, run: RunSizes) -> Sizes:
        """Return the bytes in host memory by kind, if the device has its own memory."""
        raise NotImplementedError

    def loading(self, run: RunSizes) -> Sizes:
        """Return the bytes that the host holds before the first step, by kind."""
        weights = {"weights": run.shape.parameters * run.shape.dtype_bytes}
        return weights | {"masks": sum(run.mask_bytes), "states": run.scores}

    def forwards(self, workload: Workload, depth: int, above: int) -> int:
        """Return how many layer forwards a micro-batch takes. above: layers from the first masked one on."""
        return depth + above

    def traffic(self, run: RunSizes, boundary: int) -> int:
        """Return the bytes that cross the link in a step, without the states. boundary: bytes of one boundary."""
        raise NotImplementedError

    def waiting_bytes(self, run: RunSizes) -> int:
        """Return the bytes, in addition to that traffic, that cross the link while the device waits."""
        return 0


class Plain(Way):
    """Everything is on the device; autograd keeps the saved tensors of all layers, or only the boundaries."""

    name = "plain"
    offloads = False

    def obstacle(self, workload: Workload, quantized: int) -> str | None:
        if workload.quantization is None and not SCORE_FORMATS[workload.scores].has_gradient:
            return f"autograd cannot reach {workload.scores} scores"
        return super().obstacle(workload, quantized)

    def phases(self, run: RunSizes) -> dict[str, Sizes]:
        score = SCORE_FORMATS[run.workload.scores].bytes
        resident = {
            "weights": run.outside + sum(run.weights_of_layer),
            "masks": 2 * sum(run.mask_bytes),  # bits and signs
            "gradients": run.scores,
            "states": run.states,
        }
        added = score if run.workload.own_accumulation > 1 else 0
        return {
            **self.autograd(run, resident, added),
            "optimiser": resident | {"sums": max(run.sum_of(name, score) for name in run.named)},
            **run.selection(resident),
        }

    def autograd(self, run: RunSizes, resident: Sizes, added: int) -> dict[str, Sizes]:
        """Return the phases of one micro-batch. added: bytes per weight of a gradient that is about to be added."""
        workload, shape = run.workload, run.shape
        above = [run.layer(i, score_bytes=added) for i in range(run.first, shape.layers)]
        kept = [layer.hidden if workload.gradient_checkpointing else layer.saved for layer in above]
        peaks = [sum(kept[:i]) + layer.peak for i, layer in enumerate(above)]
        return {
            "loss": resident | {"activations": sum(kept), "logits": run.loss, "reference": run.reference(1)},
            "backward": resident | {"activations": max(peaks), "reference": run.reference(1)},
        }

    def host(self, run: RunSizes) -> Sizes:
        return {}

    def loading(self, run: RunSizes) -> Sizes:
        """Return only the weights: they move to the device before the scores are made there."""
        return {"weights": run.shape.parameters * run.shape.dtype_bytes}

    def forwards(self, workload: Workload, depth: int, above: int) -> int:
        return super().forwards(workload, depth, above) if workload.gradient_checkpointing else depth

    def traffic(self, run: RunSizes, boundary: int) -> int:
        return 0


class InPlace(Plain):
    """Plain over weights that hold their masks: dropped values are stored separately; gradients are the weights'."""

    name = "in_place"

    def obstacle(self, workload: Workload, quantized: int) -> str | None:
        return Way.obstacle(self, workload, quantized)  # autograd does not have to reach the scores

    def phases(self, run: RunSizes) -> dict[str, Sizes]:
        workload, dtype = run.workload, run.shape.dtype_bytes
        # On a CPU the loaded weights are mapped from their file, so masked ones are copied before they are written.
        copies = run.masked_weights * dtype if workload.device == "cpu" else 0
        resident = {
            "weights": run.outside + sum(run.weights_of_layer) + copies,
            "masks": sum(run.mask_bytes),
            "dropped": run.aside,
            "gradients": run.masked_weights * run.grad_bytes,
            "states": run.states,
        }
        added = dtype if workload.own_accumulation > 1 or workload.grad_dtype is not None else 0
        return {
            **self.autograd(run, resident, added),
            "optimiser": resident | run.flip_sizes(),
            **run.selection(resident),
        }


class Resident(Way):
    """Keeps weights, masks and gradients of all layers on the device."""

    name = "resident"

    def phases(self, run: RunSizes) -> dict[str, Sizes]:
        resident = {
            "weights": run.outside - run.embedding_alone + sum(run.weights_of_layer),
            "masks": sum(run.mask_bytes),
            "gradients": run.masked_weights * run.grad_bytes,
        }
        above = range(run.first, run.shape.layers)
        return {
            "loss": resident | {"logits": run.loss, "reference": run.reference(2)},
            "backward": resident
            | {"activations": max(run.layer(i).peak for i in above), "boundaries": _RESIDENT_BOUNDARIES * run.hidden},
            "optimiser": resident | run.update_sizes(run.named),
            **run.selection(resident),
        }

    def host(self, run: RunSizes) -> Sizes:
        return {"weights": run.embedding_alone, "states": run.states, "boundaries": run.above * run.hidden}

    def traffic(self, run: RunSizes, boundary: int) -> int:
        return 2 * run.above * boundary


class Quantized(Resident):
    """Resident over a quantised base."""

    name = "quantized"
    over_exact, over_codes = False, True


class Layerwise(Way):
    """Keeps weights and masks of two layers on the device (the current and the next), and gradients of one."""

    name = "layerwise"
    over_codes = True
    holds_all_rows = True

    def obstacle(self, workload: Workload, quantized: int) -> str | None:
        if workload.clipping:
            return "it has no global gradient norm to clip"
        return super().obstacle(workload, quantized)

    def phases(self, run: RunSizes) -> dict[str, Sizes]:
        depth = run.shape.layers
        phases: dict[str, Sizes] = {}

        def larger(name: str, sizes: Sizes) -> None:
            if name not in phases or sum(sizes.values()) > sum(phases[name].values()):
                phases[name] = sizes

        def two(one: int, other: int | None) -> Sizes:
            both = [i for i in (one, other) if i is not None]
            weights, masks = (sum(sizes[i] for i in both) for sizes in (run.weights_of_layer, run.mask_bytes))
            return {"weights": weights, "masks": masks}

        def gradients(one: int, other: int | None) -> int:
            """Return the current layer's gradient bytes; with sums on the host also the next layer's, in transit."""
            coming = 0 if other is None or run.workload.portions == 1 else run.weights_masked_in(other)
            return (run.weights_masked_in(one) + coming) * run.grad_bytes

        boundaries = _LAYERWISE_BOUNDARIES * run.hidden
        top = {"weights": run.weights_of_layer[-1] + run.outside - run.embedding_alone, "masks": run.mask_bytes[-1]}
        larger("forward", top | {"activations": run.layer(depth - 1).forward_peak, "boundaries": boundaries})
        for i in range(depth - 1):  # two layers' experts can be larger than all that one layer's backward holds
            larger("forward", two(i, i + 1) | {"activations": run.layer(i).forward_peak, "boundaries": boundaries})
        larger("loss", top | {"logits": run.loss, "boundaries": boundaries, "reference": run.reference(3)})
        for i in range(run.first, depth):
            following = i - 1 if i > run.first else None
            held = two(i, following) | {"gradients": gradients(i, following)}
            larger("backward", held | {"activations": run.layer(i).peak, "boundaries": boundaries})
            if run.named_in[i]:
                larger("optimiser", held | run.update_sizes(run.named_in[i]) | {"boundaries": boundaries})
        return phases | run.selection({})

    def host(self, run: RunSizes) -> Sizes:
        workload = run.workload
        sums = {} if workload.portions == 1 else {"gradients": run.masked_weights * run.grad_bytes}
        return sums | {
            "weights": run.outside + sum(run.weights_of_layer),
            "masks": sum(run.mask_bytes),
            "states": run.states,
            "boundaries": (run.above + 1 + workload.of_base) * workload.together * run.hidden,
        }

    def traffic(self, run: RunSizes, boundary: int) -> int:
        """Return the bytes of weights, boundaries, gradients and gradient sums that cross the link.

        Each portion copies the weights on the way up and on the way down.
        """
        weights = sum(run.weights_of_layer) + sum(run.weights_of_layer[run.first :])
        boundaries = (2 * run.shape.layers + 4 * run.above) * boundary
        return run.workload.portions * weights + boundaries + self.waiting_bytes(run)

    def waiting_bytes(self, run: RunSizes) -> int:
        """Return the bytes of gradient sums that leave: their memory is needed for the next ones."""
        return (run.workload.portions - 1) * run.masked_weights * run.grad_bytes


class Sharded(InPlace):
    """InPlace over rows: a process holds its share of every tensor, and gathers the current layer and the next one."""

    name = "sharded"
    spreads = True

    is_for_auto = False  # it needs several processes, so users ask for it by name

    def obstacle(self, workload: Workload, quantized: int) -> str | None:
        if over := workload.accumulation % workload.processes:
            more = workload.accumulation - over + workload.processes
            asked = f"accumulation={workload.accumulation}"
            return f"{asked} must be a multiple of the {workload.processes} processes, such as {more}"
        if workload.of_base:
            return f"the objective {workload.objective} runs the base"
        return super().obstacle(workload, quantized)

    def phases(self, run: RunSizes) -> dict[str, Sizes]:
        workload, parts = run.workload, run.workload.processes
        # Embedding and head are gathered separately, one at a time. If they share one weight, it stays whole.
        outside, whole = (run.outside, 0) if not run.shape.tied else (0, run.outside)
        resident = {
            "weights": (outside + sum(run.weights_of_layer)) // parts + whole,
            "masks": sum(run.mask_bytes) // parts,
            "dropped": run.aside // parts,
            "gradients": run.masked_weights * run.grad_bytes // parts,
            "states": run.states // parts,
        }
        own = self.autograd(run, resident, 0)  # only "loss" stays: gradients come layer by layer here
        several = workload.own_accumulation > 1
        unsummed = 0 if workload.reduces_every_batch or not several else _REDUCED * run.masked_weights
        rows = resident["gradients"] if workload.reduces_every_batch and several else 0
        own["loss"] |= {"gathered": run.embedding_alone, "unsummed": unsummed, "gradients": rows}
        before = {name: size for name, size in resident.items() if name != "gradients"} | {"unsummed": unsummed}
        found: list[Sizes] = []
        for i in range(run.first, run.shape.layers):
            below = run.weights_of_layer[i - 1] if i else 0  # gathered in advance
            masked, layer = run.weights_masked_in(i), run.layer(i)
            left = i - run.first  # layers whose saved tensors are still kept
            saved = left * (layer.hidden if workload.gradient_checkpointing else layer.saved)
            done = rows or sum(map(run.weights_masked_in, range(i + 1, run.shape.layers))) * run.grad_bytes // parts
            made = masked * run.shape.dtype_bytes
            above = run.weights_masked_in(i + 1) if i + 1 < run.shape.layers else 0
            sending = _REDUCED * (above + above // parts)  # the layer's gradients that are sent, and the summed rows
            at_work = {"activations": saved + layer.peak, "gathered": run.weights_of_layer[i] + below}
            at_work["sums"] = made + sending
            sent = masked * _REDUCED + (0 if unsummed else made)
            summing = {"activations": saved, "gathered": below, "sums": sent}
            found += [before | {"gradients": done} | sizes for sizes in (at_work, summing)]
        own["backward"] = max(found, key=lambda sizes: sum(sizes.values()))
        flip_sizes = {name: size // parts for name, size in run.flip_sizes().items() if name != "sums"}
        return {**own, "optimiser": resident | flip_sizes, **run.selection(resident)}

    def loading(self, run: RunSizes) -> Sizes:
        """Return what is whole in host memory before the first step, or on the first process after the last."""
        # Of the largest matrix: the weight, its absolute values, and three tensors in fp32 to draw the scores.
        drawn = max(map(run.size_of, run.named)) * (2 * run.shape.dtype_bytes + 12)
        exported = 2 * sum(run.mask_bytes)  # packed, and as they are written
        rows = run.scores // run.workload.processes if run.workload.device == "cpu" else 0
        return {"whole": max(drawn, exported), "states": rows}


WAYS: dict[str, Way] = {way.name: way for way in (Plain(), InPlace(), Resident(), Quantized(), Layerwise(), Sharded())}


def ordered(device: str) -> list[Way]:
    """Return all modes, the fastest first on a device of this type.

    On a GPU a product with a mask in place is a dense one. From 256 tokens on, the model of the Triton kernels
    (backends/triton/plan.py) expects plain's fused products to be slower.
    """
    return sorted(WAYS.values(), key=lambda way: device != "cpu" and way.name != InPlace.name)


def ways_over(quantization: str | None, device: str) -> list[Way]:
    """Return auto's modes that train over a base of this format, None for exact weights; the fastest first."""
    ways = [way for way in ordered(device) if way.is_for_auto]
    return [way for way in ways if (way.over_exact if quantization is None else way.over_codes)]
