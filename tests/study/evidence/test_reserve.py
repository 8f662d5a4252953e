"""The reserve: no other run reads it, a study that asks for it does not train again, and each opening is counted."""

import hashlib
import json
import random

import pytest
from tiny import WORDS
from tiny_run import refused, succeed
from tiny_study import FEW, make_study, run_quietly, write_ground

from mft.config import DataConfig
from mft.data import reserve as documents
from mft.data import sources
from mft.data.splits import load_splits
from mft.models.pretrained import load_model
from mft_study.evidence import reserve_ledger
from mft_study.report.write import write_study_report

HELD = 20  # files in the reserve
SOURCE = "domains.count.source=headers"


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """Write the tiny model, and headers of numbers; the last files of each split are the reserve."""
    directory = tmp_path_factory.mktemp("ground")
    write_ground(directory)
    draw = random.Random(0)
    texts = {f"{n}.h": " ".join(str(draw.randrange(1, WORDS)) for _ in range(20)) for n in range(700)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MFT_CACHE", str(directory / "cache"))
        patch.setattr(sources, "header_files", lambda: texts)
        patch.setattr(documents, "_hashes", frozenset)
        held_out = sources.open_source(DataConfig(source="headers")).load()
        last = [held_out[split].rows[i]["text"] for split in ("validation", "test") for i in range(-HELD // 2, 0)]
        hashes = frozenset(hashlib.sha256(text.encode()).hexdigest()[:32] for text in last)
        patch.setattr(documents, "_hashes", lambda: hashes)
        yield directory


@pytest.fixture
def ledger(tmp_path, monkeypatch):
    path = tmp_path / "reserve.json"
    monkeypatch.setattr(reserve_ledger, "ledger_path", lambda: path)
    return path


def study(ground, *overrides):
    make_study(ground, FEW)
    return make_study(ground, FEW, [SOURCE, *overrides])


def run(ground, directory, *overrides, **options):
    return run_quietly(study(ground, *overrides), directory, **options)


def rows(ground, subset, **options):
    tokenizer = load_model(study(ground).model)[1]
    splits = load_splits(DataConfig(source="headers", subset=subset, sequence_length=12, **options), tokenizer)
    held = documents.find_reserved(list(sources.header_files().values()))
    return splits, {split: set(getattr(splits, split)["document"]) & held for split in sources.SPLITS}, held


def test_no_run_reads_the_reserve_that_does_not_ask_for_it(ground):
    splits, read, held = rows(ground, None)
    assert len(held) == HELD
    assert read == {"train": set(), "validation": set(), "test": set()}
    assert any("test: 10 rows belong to the reserve and were left out" in note for note in splits.notes)
    own, read, _ = rows(ground, "reserve")
    assert read == {"train": set(), "validation": set(), "test": held}
    assert set(own.test["document"]) == held
    assert own.validation["input_ids"] == splits.validation["input_ids"]
    assert own.train["input_ids"] == splits.train["input_ids"]


@pytest.mark.slow
def test_a_finished_study_is_tested_on_the_reserve_without_training(ground, tmp_path, ledger):
    before, lines = run(ground, tmp_path / "run")
    assert not ledger.exists()
    found, lines = run(ground, tmp_path / "run", "domains.count.subset=reserve")
    assert [", on test: evaluated" in line for line in lines] == [True] * 6
    assert found.test["count"]["MFT"][0].evaluation.documents.tolist() != (
        before.test["count"]["MFT"][0].evaluation.documents.tolist()
    )
    (entry,) = json.loads(ledger.read_text())
    assert (entry["study"], entry["opened"]) == ("run", ["count"])
    write_study_report(found, tmp_path)
    assert "Test is the reserve, documents that no study before its first opening has read." in (
        (tmp_path / "table.md").read_text()
    )
    _, lines = run(ground, tmp_path / "run", "domains.count.subset=reserve")
    assert (len(json.loads(ledger.read_text())), lines) == (1, [])  # the same opening as before


def test_a_study_opens_the_reserve_once_and_openings_count_across_studies(ground, tmp_path, ledger):
    asked = ("domains.count.subset=reserve", "seeds=[0]")
    assert run(ground, tmp_path / "one", *asked)[0].reserve_openings == ["one"]
    second, _ = run(ground, tmp_path / "two", *asked)
    assert second.reserve_openings == ["one", "two"]
    write_study_report(second, tmp_path)
    assert "Warning: the reserve was opened 2 times, by one, two: what" in (tmp_path / "table.md").read_text()
    with pytest.raises(ValueError, match=r"must be opened only once per study, two has opened it on .* Pass --again"):
        run(ground, tmp_path / "two", *asked, "seeds=[0,1]")
    third, _ = run(ground, tmp_path / "two", *asked, "seeds=[0,1]", again=True)
    assert third.reserve_openings == ["one", "two", "two"]


def test_the_command_says_how_to_open_it_again(ground, tmp_path, ledger):
    study(ground)
    call = ["compare", "--config", str(ground / "study.yaml"), SOURCE, "domains.count.subset=reserve", "seeds=[0]"]
    ledger.write_text(json.dumps([{"study": "run", "models": "others", "date": "2026-01-01"}]))
    assert "run has opened it on 2026-01-01" in refused(*call, f"output_dir={tmp_path}/run")
    succeed(*call, f"output_dir={tmp_path}/run", "--again")
