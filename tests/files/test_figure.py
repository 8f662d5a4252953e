"""Pictures are complete or absent."""

import os

import pytest

from mft.files.figure import new_figure, save_figure


def test_a_picture_that_fails_while_it_is_written_leaves_the_one_before(tmp_path, monkeypatch):
    path, figure = tmp_path / "plot.png", new_figure(2, 1)
    save_figure(figure, path)
    before = path.read_bytes()
    assert before.startswith(b"\x89PNG")

    def fail(target, **options):
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(KeyboardInterrupt):
        save_figure(figure, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["plot.png"]
