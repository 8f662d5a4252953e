"""What loads leaves no thread behind, and so no second pool of OpenMP threads."""

import threading

import pytest

from mft.serving import launch


def test_the_base_is_loaded_in_a_thread_that_ends(exports, monkeypatch):
    threads = []

    def load(*_):
        threads.append(threading.current_thread())
        raise ValueError("loaded enough")

    monkeypatch.setattr(launch, "_load", load)
    with pytest.raises(ValueError, match="loaded enough"):
        launch.serve(exports, "base")
    assert threads[0] is not threading.main_thread()
    assert not threads[0].is_alive()
