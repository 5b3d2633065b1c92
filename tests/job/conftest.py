import pytest
import torch


@pytest.fixture
def ids():
    """Calibration tokens of the tiny models."""
    return torch.randint(0, 256, (8, 32))
