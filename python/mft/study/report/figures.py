"""Pictures of a finished study's models: the loss surface round them, and how alike the masks of its runs are."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from mft.checks import nearest
from mft.config import ModelConfig
from mft.study.config import FULL, MASK
from mft.study.load import load_study
from mft.study.outcome import Unit
from mft.study.plan import fine_tune_of, selection
from mft.study.report.overlap import overlaps, plot_overlaps
from mft.study.report.surface import loss_surface, plane_through, plot_surfaces, random_plane, weights_of
from mft.study.report.table import reference_of
from mft.study.store import BASE_MODEL, STUDY, Store, open_store
from mft.study.workspace import Workspace, with_weights

REACH = 0.5  # beyond the models: of the distance between fine-tune and control, or of the rows' norms


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
    """Validation loss of the first seed's models: through fine-tune, control and MFT, and round the first and the last.

    Args:
        directory: a finished study's. domain, arm: the first, and the first of MFT, if None. rows: of validation that
            every point is evaluated on.
    """
    with _opened(directory) as ground:
        domain = next(iter(ground.study.domains)) if domain is None else domain
        ground.check("domain", domain, list(ground.study.domains))
        mask = ground.masked_arm(arm)
        full, control = ground.arm(FULL), ground.control_of(mask)
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
    """Which weights the masks of all seeds and domains drop: overlap of each pair, against chance."""
    with _opened(directory) as ground:
        arm = ground.masked_arm(arm)
        sets = {
            f"{domain}, seed {seed}": ground.dropped(domain, arm, seed)
            for domain in ground.study.domains
            for seed in ground.study.seeds
        }
        if len(sets) < 2:
            raise ValueError(f"the study must hold two masks to compare, got one seed and one domain in {directory}")
        plot_overlaps(overlaps(sets), path, title=f"weights dropped by {arm}")


class _Ground:
    """A study's models, made from its files."""

    def __init__(self, store: Store) -> None:
        self.study, self._store = store.study, store
        base = store.directory / BASE_MODEL
        model = self.study.model if self.study.scratch is None else ModelConfig(str(base), dtype="float32")
        self.workspace = Workspace(self.study, model)
        self._chosen = selection(self.study, store.outcomes()).chosen

    def arm(self, kind: str) -> str:
        name = self.study.named(kind)
        if name is None:
            raise ValueError(f"the study must hold an arm of kind {kind}, got {', '.join(self.study.arms)}")
        return name

    def masked_arm(self, name: str | None) -> str:
        """The arm of MFT of this name; None: the first."""
        known = [arm for arm, config in self.study.arms.items() if config.kind == MASK]
        if name is None:
            return self.arm(MASK)
        self.check("arm", name, known)
        return name

    def control_of(self, arm: str) -> str:
        """The control of the same layers."""
        name = reference_of(self.study, arm)
        if name is None:
            raise ValueError(f"the study must hold a control of {arm}'s layers, got {', '.join(self.study.arms)}")
        return name

    def model(self, domain: str, arm: str, seed: int):
        unit = self._unit(domain, arm, seed)
        start = fine_tune_of(self.study, self._chosen, unit)
        self.workspace.begin(domain, self._file(unit) if start is None else self._file(start))
        return (
            self.workspace.model if start is None else with_weights(self.workspace.model, load_file(self._file(unit)))
        )

    def dropped(self, domain: str, arm: str, seed: int) -> dict[str, Tensor]:
        unit = self._unit(domain, arm, seed)
        start = fine_tune_of(self.study, self._chosen, unit)
        assert start is not None  # of a mask
        before = load_file(self._file(start))
        return {name: (weight == 0) & (before[name] != 0) for name, weight in load_file(self._file(unit)).items()}

    def check(self, name: str, value: str, known: Sequence[str]) -> None:
        if value not in known:
            raise ValueError(f"--{name} must be one of {', '.join(known)}, got {value!r}{nearest(value, known)}")

    def _unit(self, domain: str, arm: str, seed: int) -> Unit:
        if arm not in self._chosen.get(domain, {}):
            raise ValueError(f"the study must be finished, {arm} on {domain} is not: run mft compare to its end")
        return Unit(domain, arm, seed, self._chosen[domain][arm])

    def _file(self, unit: Unit) -> Path:
        path = self._store.trained(unit, self._chosen)
        if not path.is_file():
            raise ValueError(f"the study must be finished, {unit} is not: run mft compare to its end; no file {path}")
        return path


@contextmanager
def _opened(directory: Path) -> Iterator[_Ground]:
    if not (directory / STUDY).is_file():
        raise ValueError(f"directory must be a study's (with a {STUDY}), got {directory}")
    study = load_study(directory / STUDY)
    with open_store(study, directory) as store, torch.no_grad():
        yield _Ground(store)
