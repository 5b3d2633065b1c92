"""Shared set-up of all tests: no network, reproducible Hypothesis runs, GPU tests skipped where there is no GPU."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")           # tiny tensors: threads of busy cores only wait for each other
os.environ.setdefault("HF_HUB_OFFLINE", "1")            # before transformers is imported anywhere
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")      # before Triton is imported anywhere: its kernels then run on CPU tensors

settings.register_profile("gptvq", deadline=None, derandomize=True, database=None, max_examples=60,
                          suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
settings.load_profile("gptvq")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from the same random numbers, whatever ran before it."""
    torch.manual_seed(0)
