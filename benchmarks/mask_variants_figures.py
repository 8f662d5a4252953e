"""Pictures of what masks do on the ground of mask_variants: loss surfaces, overlap between runs, flips over training.

python -m benchmarks.mask_variants_figures --base DIR --source FILE --log FILE --keep 0.98 --lr 1e-3 --out DIR
"""

import argparse
from pathlib import Path

import torch

from benchmarks.mask_variants import situations
from benchmarks.mask_variants_ground import Ground, Log
from benchmarks.mask_variants_rules import Rule
from mft.inspection import initial_masks
from mft.overlap import FlipCurve, dropped, flipped, overlaps, plot_flips, plot_overlaps
from mft.recipe import StepReport
from mft.surface import loss_surface, plane_through, plot_surfaces, random_plane, weights_of

ROWS = 48  # of validation, for each point of a surface


class Watch(Rule):
    """Hands a variant's steps to a FlipCurve, and remembers its first mask."""

    def begin(self, model, steps):
        self.curve, self.initial = FlipCurve(model), initial_masks(model)

    def after_update(self, step, steps):
        self.curve(StepReport(step, steps, 0.0, 0.0, 0, 0.0))


def main() -> None:
    """Train three masks that differ in the order of the rows alone, one other start, and the control; draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--source", default="stdlib")
    parser.add_argument("--full-lr", type=float, default=2e-3)
    parser.add_argument("--full-epochs", type=float, default=2.0)
    parser.add_argument("--situation", default="tuned")
    parser.add_argument("--keep", type=float, default=0.98)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--control-lr", type=float, default=8e-4)
    parser.add_argument("--points", type=int, default=9)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    declared = situations(options.base, options.source, options.full_lr, options.full_epochs)
    ground = Ground(declared[options.situation], 0, Log(options.log), options.log.parent / "fine-tuned")

    epochs = ground.situation.epochs
    masks, learned, curves = {}, {}, {}
    masked = None
    for name, part, init in (
        *((f"magnitude, order {part}", part, "magnitude") for part in range(3)),
        ("normal start", 0, "normal"),
    ):
        watch = Watch()
        model, _ = ground.masks("figures", options.lr, epochs, options.keep, [watch], init=init, part=part)
        masked = model if masked is None else masked
        found = initial_masks(model)
        masks[name], learned[name], curves[name] = dropped(found), flipped(found, watch.initial), watch.curve
    plot_overlaps(overlaps(masks), options.out / "overlap_dropped.png", title="Dropped weights")
    plot_overlaps(overlaps(learned), options.out / "overlap_flipped.png", title="Weights flipped since the start")
    plot_flips(curves, options.out / "flips.png")

    control, _ = ground.weights("figures, control", options.control_lr, epochs)
    models = {"fine-tune": ground.model, "masked": masked, "control": control}
    found = {name: weights_of(model, ground.names) for name, model in models.items()}
    rows = ground.splits.validation.select(range(0, len(ground.splits.validation), 3)).select(range(ROWS))
    grid = {"points": options.points, "first": ground.first, "batch_size": 16}
    surfaces = {
        "plane of the three models": loss_surface(ground.model, plane_through(found), rows, reach=1.5, **grid),
        **{
            f"random directions round the {name}": loss_surface(
                ground.model, random_plane(found[name], name=name), rows, reach=0.5, **grid
            )
            for name in ("fine-tune", "masked")
        },
    }
    plane, *others = surfaces
    plot_surfaces({plane: surfaces[plane]}, options.out / "surface_plane.png")
    plot_surfaces({name: surfaces[name] for name in others}, options.out / "surface_random.png")


if __name__ == "__main__":
    main()
