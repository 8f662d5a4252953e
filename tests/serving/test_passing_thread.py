"""What loads leaves no thread behind, and so no second pool of OpenMP threads."""

import threading

import pytest

from mft.serving import launch
from mft.serving.passing_thread import in_passing_thread


def test_work_ends_with_its_thread_and_gives_or_raises_what_it_did():
    thread = in_passing_thread(threading.current_thread)
    assert thread is not threading.current_thread()
    assert not thread.is_alive()
    with pytest.raises(ZeroDivisionError):
        in_passing_thread(lambda: 1 // 0)


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
