"""Where the Triton tests run: on a GPU, else on CPU tensors in Triton's interpreter (tests/conftest.py has switched it on)."""
import pytest
import torch

from gptvq.backends import triton, triton_launch


@pytest.fixture(scope="session")
def device():
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not triton.serves(where):
        pytest.skip(triton.why_not(where))
    return where


@pytest.fixture
def forced(monkeypatch, device):
    """All operators on `device` by Triton."""
    monkeypatch.setenv("GPTVQ_BACKEND", "triton")
    return device


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels launched so far in this test."""
    names, start = [], triton_launch.start
    monkeypatch.setattr(triton_launch, "start", lambda name, *rest: (names.append(name), start(name, *rest)))
    return names
