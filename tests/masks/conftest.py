"""Fixtures that the tests of masks share."""

import pytest
import torch


@pytest.fixture
def tokens():
    return torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
