"""sums.npz: what each interval of a study was computed from, document by document, for anyone who has numpy.

It is an archive of arrays, which numpy.load opens. For S seeds and D documents, the names are paths:

    DOMAIN/SPLIT/TEXT/documents      (D,) a hash of each document's scored tokens: equal hashes, equal tokens
    DOMAIN/SPLIT/TEXT/tokens         (D,) how many tokens are scored
    DOMAIN/SPLIT/TEXT/questions      (D,) how many questions were asked, if any
    DOMAIN/SPLIT/TEXT/ARM/seeds      (S,)
    DOMAIN/SPLIT/TEXT/ARM/loss       (S, D) sum of the loss over a document
                         /tempered   (S, D) the same at the run's own temperature, which is in /temperature (S,)
                         /kl         (S, D) sum of the KL divergence from the arm's start
                         /correct    (S, D) tokens whose likeliest prediction is right
                         /answers    (S, D) questions that are answered exactly
    DOMAIN/bytes/ARM                 () bytes to store besides the start, mean over seeds

SPLIT is validation or test. TEXT is DOMAIN itself, or a text that measures forgetting. An ARM with a setting, such as
"MFT, lr 0.001, epochs 1", is a run that was compared at equal budgets. loss, tempered and kl are integers in units of
1 / UNITS nats. They take a third of the space of floating-point numbers and lose nothing, because statistics.py rounds
to NATS_DECIMALS before it computes anything.
"""

import hashlib
import os
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mft.data.batches import take_rows
from mft.data.tokenization import IGNORED
from mft.evaluation.evaluate import Evaluation
from mft.files.atomic import atomic_file
from mft_study.outcome import General, Measured

FILE = "sums.npz"
NATS_DECIMALS = 4  # of a document's sum: 1e-4 nats over some hundred tokens
UNITS = 10**NATS_DECIMALS  # per nat
Run = Measured | General
_HASHED = 8  # bytes of a document's hash: one 64-bit integer
_ROWS = 64  # hashed at once


class Sums:
    """The arrays of a sums.npz, by name."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]] | None = None) -> None:
        self.arrays = dict(arrays or {})

    def add(self, place: str, arm: str, runs: Mapping[int, Run], hashes: Mapping[int, int]) -> None:
        """Add an arm's runs by seed at a place DOMAIN/SPLIT/TEXT. Raises: ValueError if documents or tokens differ."""
        seeds = sorted(runs)
        for seed in seeds:
            evaluation = runs[seed].evaluation
            documents = np.array([hashes.get(number, number) for number in evaluation.documents.tolist()])
            for name, values in (("documents", documents), ("tokens", _whole(evaluation.tokens))):
                if not np.array_equal(self.arrays.setdefault(f"{place}/{name}", values), values):
                    raise ValueError(
                        f"all runs at {place} must be of the same {name}, got others of {arm}, seed {seed}"
                    )
        self.arrays[f"{place}/{arm}/seeds"] = np.array(seeds)
        columns = [_columns(runs[seed]) for seed in seeds]
        for name in columns[0]:
            if all(name in each for each in columns):
                self.arrays[f"{place}/{arm}/{name}"] = np.stack([each[name] for each in columns])
        asked = runs[seeds[0]]
        if isinstance(asked, Measured) and asked.questions is not None:
            self.arrays[f"{place}/questions"] = _whole(asked.questions)

    def add_bytes(self, domain: str, arm: str, size: float) -> None:
        """Add the bytes that an arm stores besides its start."""
        self.arrays[f"{domain}/bytes/{arm}"] = np.array(size)

    def runs(self, domain: str, arm: str, *, text: str | None = None, split: str = "test") -> dict[int, Run]:
        """Return an arm's runs by seed, on the domain or a general text. Raises: ValueError if the file holds none."""
        place = f"{domain}/{split}/{text or domain}"
        if f"{place}/{arm}/seeds" not in self.arrays:
            raise ValueError(
                f"{FILE} must hold sums of the arm {arm!r} at {place}, got "
                f"{', '.join(self.arms(domain, text=text, split=split)) or 'none of any arm'}"
            )
        is_general = text is not None and text != domain
        return {
            seed: self._run(place, arm, row, is_general=is_general)
            for row, seed in enumerate(self.arrays[f"{place}/{arm}/seeds"].tolist())
        }

    def arms(self, domain: str, *, text: str | None = None, split: str = "test") -> list[str]:
        """Return the names of the arms that were measured there."""
        start, end = f"{domain}/{split}/{text or domain}/", "/seeds"
        held = (name for name in self.arrays if name.startswith(start) and name.endswith(end))
        return sorted(name[len(start) : -len(end)] for name in held)

    def _run(self, place: str, arm: str, row: int, *, is_general: bool) -> Run:
        def nats(name: str) -> Tensor | None:
            found = self.arrays.get(f"{place}/{arm}/{name}")
            return None if found is None else torch.from_numpy(found[row] / UNITS)

        def whole(name: str) -> Tensor:
            return torch.from_numpy(self.arrays[f"{place}/{name}"])

        documents, tokens, loss = whole("documents"), whole("tokens").double(), nats("loss")
        assert loss is not None, "add() always writes it"
        evaluation = Evaluation(documents, tokens, loss, whole(f"{arm}/correct")[row].double())
        if is_general:
            return General(evaluation, nats("kl"))
        measured, tempered = Measured(evaluation), nats("tempered")
        if tempered is not None:
            measured.tempered = Evaluation(documents, tokens, tempered, evaluation.correct)
            measured.temperature = float(self.arrays[f"{place}/{arm}/temperature"][row])
        if f"{place}/{arm}/answers" in self.arrays:
            measured.answers, measured.questions = whole(f"{arm}/answers")[row], whole("questions")
        return measured


def write_sums(sums: Sums, path: str | os.PathLike) -> None:
    """Write sums to path, whole or not at all. Equal sums give equal bytes."""
    with atomic_file(path) as scratch, scratch.open("wb") as file:
        arrays: dict[str, Any] = sums.arrays
        np.savez_compressed(file, **arrays)


def read_sums(path: str | os.PathLike) -> Sums:
    """Read what write_sums wrote. Raises: ValueError if path is another file."""
    rule = f"{path} must be the {FILE} of a study, got"
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{rule} a file that is not an archive of arrays")
    try:
        with np.load(path, allow_pickle=False) as held:
            arrays = {name: held[name] for name in held.files}
    except (ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{rule} an archive that cannot be read ({error})") from None
    if others := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
        raise ValueError(f"{rule} an archive with {', '.join(others[:3])}")
    return Sums(arrays)


def document_hashes(dataset: Any) -> dict[int, int]:
    """Return a hash of the scored rows of each document in dataset, by the document's number.

    Rows must be in order, and hold one document each. Equal hashes mean the same scored tokens after the same tokens.
    """
    found: dict[int, Any] = {}
    for start in range(0, len(dataset), _ROWS):
        rows = take_rows(dataset, list(range(start, min(start + _ROWS, len(dataset)))))
        for number, ids, labels in zip(rows.documents, rows.input_ids.numpy(), rows.labels.numpy(), strict=True):
            scored = labels != IGNORED
            size = int(scored.nonzero()[0][-1]) + 1 if scored.any() else 0
            hashed = found.setdefault(number, hashlib.sha256())
            hashed.update(ids[:size].astype("<i4").tobytes() + scored[:size].tobytes())
    return {n: int.from_bytes(each.digest()[:_HASHED], "big", signed=True) for n, each in found.items()}


# ---------------------------------------------------------------------------------------------- private


def _columns(run: Run) -> dict[str, Any]:
    """Return what the file holds for one run: arrays (D,), and its temperature."""
    evaluation = run.evaluation
    found: dict[str, Any] = {"loss": _nats(evaluation.loss_sums), "correct": _whole(evaluation.correct)}
    if isinstance(run, General):
        return found if run.kl is None else found | {"kl": _nats(run.kl)}
    if run.tempered is not None:
        temperature = np.nan if run.temperature is None else run.temperature
        found |= {"tempered": _nats(run.tempered.loss_sums), "temperature": temperature}
    return found if run.answers is None else found | {"answers": _whole(run.answers)}


def _whole(values: Tensor) -> NDArray[np.int64]:
    return values.long().numpy()


def _nats(values: Tensor) -> NDArray[np.int64]:
    return np.rint(values.double().numpy() * UNITS).astype(np.int64)
