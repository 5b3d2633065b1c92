"""Memory: what freed tensors leave behind is given back, and what comparing logits takes is what is said."""
import platform
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gptvq.evaluate import divergence, divergence_bytes
from gptvq.machine import resident_memory, trim_memory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="Linux with glibc tells and takes it")


def test_holes_are_given_back():
    """malloc itself would keep them: something that lives on lies behind each."""
    kept, freed = [], []
    for _ in range(2000):
        freed.append(torch.ones(16_000))
        kept.append(torch.ones(100))
    full = resident_memory().now
    freed.clear()
    trim_memory()
    assert full - resident_memory().now > 0.8 * 2000 * 64_000
    assert all(bool((one == 1).all()) for one in kept)


class Constant(nn.Module):
    """A model with the same logits everywhere."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.bias + torch.zeros(*input_ids.shape, 1))


@pytest.mark.parametrize("positions", [600, 40])
def test_memory_of_a_comparison(positions):
    vocabulary = 300_000
    model, tokens = Constant(vocabulary), torch.zeros(2, positions, dtype=torch.int64)
    dense = torch.zeros(2, positions, vocabulary)
    divergence(dense[:, :1], model, tokens[:, :1])              # what a first call does
    trim_memory()
    before = resident_memory(reset=True).now
    assert divergence(dense, model, tokens)["kl"] == 0
    taken, said = resident_memory().peak - before, divergence_bytes(positions, vocabulary, 4)
    assert 0.6 * said < taken < 1.25 * said + 64e6          # what else a process of many tests takes meanwhile
