"""Pictures of a finished study's models: the loss surface around them, and how alike the masks of its runs are."""

from collections.abc import Callable
from pathlib import Path

from mft_study.arms.full import Full
from mft_study.report.finished import open_finished
from mft_study.report.pictures.overlap import overlaps, plot_overlaps
from mft_study.report.pictures.surface import loss_surface, plane_through, plot_surfaces, random_plane, weights_of

REACH = 0.5  # how far a surface goes beyond the models, in units of its plane (see Plane.unit)


def draw_surface(
    directory: Path,
    path: Path,
    *,
    domain: str | None = None,
    arm: str | None = None,
    rows: int = 32,
    points: int = 11,
    on_point: Callable[[int, int], None] | None = None,
) -> None:
    """Draw the validation loss of the first seed's models on three planes.

    One plane goes through fine-tune, control and MFT. The others lie around the fine-tune and around MFT.
    Args: directory: a finished study's; domain, arm: None for the study's first, and its first of MFT; rows: of
        validation, for every point; points: along each axis; on_point: called with the points done and their number.
    """
    with open_finished(directory) as ground:
        domain = next(iter(ground.study.domains)) if domain is None else domain
        ground.check("domain", domain, list(ground.study.domains))
        mask = ground.masked_arm(arm)
        full, control = ground.arm(Full), ground.control_of(mask)
        names, first = ground.workspace.layers_of(ground.study.arms[mask])
        seed = ground.study.seeds[0]
        models = {arm: ground.model(domain, arm, seed) for arm in (full, control, mask)}
        weights = {arm: weights_of(model, names) for arm, model in models.items()}
        planes = {
            f"through {full}, {control} and {mask}": plane_through(weights),
            f"round {full}": random_plane(weights[full], name=full),
            f"round {mask}": random_plane(weights[mask], name=mask),
        }
        validation = ground.workspace.splits(domain).validation
        dataset = validation.select(range(min(rows, len(validation))))
        surfaces = {}
        for number, (title, plane) in enumerate(planes.items()):

            def advance(done: int, of: int, before: int = number) -> None:
                if on_point is not None:
                    on_point(before * of + done, len(planes) * of)

            surfaces[title] = loss_surface(
                models[full], plane, dataset, reach=REACH, points=points, first=first, on_point=advance
            )
        plot_surfaces(surfaces, path)


def draw_overlap(directory: Path, path: Path, *, arm: str | None = None) -> None:
    """Draw how far the weights that the masks of all seeds and domains drop overlap, by pair, against chance."""
    with open_finished(directory) as ground:
        arm = ground.masked_arm(arm)
        sets = {
            f"{domain}, seed {seed}": ground.dropped(domain, arm, seed)
            for domain in ground.study.domains
            for seed in ground.study.seeds
        }
        if len(sets) < 2:
            raise ValueError(f"the study must hold two masks to compare, got one seed and one domain in {directory}")
        plot_overlaps(overlaps(sets), path, title=f"weights dropped by {arm}")
