"""Fixtures that the tests of masks share."""

import pytest
import torch


@pytest.fixture
def tokens():
    return torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def masked():
    """Return the Llama of exports.py with masks in two of its three layers."""
    from exports import llama

    from mft.config import MaskConfig
    from mft.masks.convert import mask_model

    return mask_model(llama(), MaskConfig.paper(layers_to_transform=[1, 2]))


@pytest.fixture
def saved(masked, tmp_path):
    """Return the directory of its export."""
    from mft.masks.export import save_masks

    return save_masks(masked, tmp_path / "export", coding="packed")
