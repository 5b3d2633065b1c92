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
def force(monkeypatch, device):
    """force(): from here on all operators by Triton, which on a GPU takes no CPU tensors."""
    return lambda: monkeypatch.setenv("GPTVQ_BACKEND", "triton")


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels launched so far in this test."""
    names, start = [], triton_launch.start
    monkeypatch.setattr(triton_launch, "start", lambda name, *rest: (names.append(name), start(name, *rest)))
    return names
