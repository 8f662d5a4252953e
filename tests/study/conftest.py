"""The tiny model and its data on disk, once per file."""

import pytest
from tiny_study import new_ground


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    with new_ground(tmp_path_factory) as directory:
        yield directory
