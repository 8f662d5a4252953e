"""The CUDA kernels run on the host, in the emulator; the tests skip where it cannot be built."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def emulator():
    """Builds the library once, before the first test."""
    import emulated

    try:
        emulated.library()
    except emulated.NotBuilt as reason:
        pytest.skip(str(reason))


@pytest.fixture(autouse=True)
def settings_of_the_emulator(emulator):
    """Those of one test are not those of the next."""
    import emulated

    emulated.set_settings()
    yield
    emulated.set_settings()
