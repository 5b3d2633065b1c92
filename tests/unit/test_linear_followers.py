"""Layers called on one input are computed together behind their own modules."""
import copy

import pytest
import torch
from packed_cases import random_weight
from torch import nn

from gptvq import QuantSpec, VQLinear, linear
from gptvq.backends import native

pytestmark = pytest.mark.skipif(not native.serves(torch.device("cpu")), reason="gptvq._C is not built here")


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    """Layers are too small here to be joined otherwise; and no other test's layer is the one that was called last."""
    monkeypatch.setattr(native, "JOIN_FROM", 0)
    monkeypatch.setattr(linear, "_leader", (None, None))


class Attention(nn.Module):
    """q, k and v of different sizes and formats on one input, and a layer on another."""

    def __init__(self):
        super().__init__()
        self.q = VQLinear.from_weight(random_weight(QuantSpec(64, 96, 2, 2, 16, 32)), torch.randn(64))
        self.k = VQLinear.from_weight(random_weight(QuantSpec(32, 96, 2, 2, 16, 32), 1))
        self.v = VQLinear.from_weight(random_weight(QuantSpec(40, 96, 1, 3, 16, 96, 32), 2))
        self.o = VQLinear.from_weight(random_weight(QuantSpec(20, 64, 2, 3, 16, 64), 3))

    def forward(self, x):
        return self.k(x), self.v(x), self.o(self.q(x))


@pytest.fixture
def calls(monkeypatch):
    """Sizes of the groups that are computed together."""
    seen = []
    together = native.PreparedLinear.together
    monkeypatch.setattr(native.PreparedLinear, "together", lambda self, others, *args: seen.append(1 + len(others)) or together(self, others, *args))
    return seen


def alone(model, x):
    return [native.PreparedLinear(*m._decode_tables(), m.bias, m.spec)(x, m.activations) for m in (model.k, model.v)]


@torch.no_grad()
@pytest.mark.parametrize("activations", ["a16", "a8", "fp32"])
def test_results_are_those_of_each_layer_alone(calls, activations):
    model = Attention()
    for module in model.children():
        module.activations = activations
    for step in range(4):
        x = torch.randn(1, 3, 96)
        k, v, _ = model(x)
        assert all(torch.equal(a, b) for a, b in zip((k, v), alone(model, x)))
    assert calls == [3, 3, 3]                           # after one call that learns


@torch.no_grad()
def test_an_input_changed_in_place_is_not_taken_from_store():
    model = Attention()
    for _ in range(2):
        model(torch.randn(2, 96))
    x = torch.randn(2, 96)
    model.k(x)
    x.mul_(2)
    assert torch.equal(model.v(x), alone(model, x)[1])


@torch.no_grad()
def test_a_layer_no_longer_called_is_followed_no_more(calls):
    model = Attention()
    for _ in range(3):
        model(torch.randn(2, 96))
    calls.clear()
    for _ in range(3):
        model.k(torch.randn(2, 96))
    assert calls == [3] and model.v._ready is not None       # computed once in vain
    assert torch.equal(model.v(x := torch.randn(2, 96)), alone(model, x)[1]) and model.v._ready is None


def test_many_tokens_gradients_and_inference_tensors_go_alone(calls):
    model = Attention()
    for _ in range(2):
        model(torch.randn(2, 96, requires_grad=True))[1].sum().backward()
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(200, 96))
    with torch.inference_mode():
        for _ in range(2):
            k, v, _ = model(x := torch.randn(2, 96))
            assert torch.equal(v, alone(model, x)[1])
    assert calls == []


@torch.no_grad()
def test_copies_and_moves_start_anew():
    model = Attention()
    for _ in range(2):
        model(torch.randn(2, 96))
    other = copy.deepcopy(model)
    assert all(not m._followers and m._ready is None for m in other.children())
    x = torch.randn(2, 96)
    model.k(x)
    model.v.gs.mul_(2)                                  # after v's result was stored, before it is fetched
    model.double().float()
    assert torch.equal(model.v(x), alone(model, x)[1])
    assert torch.equal(model.o(x := torch.randn(1, 64)), model.o(x))    # one layer twice on one input


@torch.no_grad()
def test_a_result_of_another_stream_is_not_taken(calls, monkeypatch):
    """`turn` is what the results of a GPU are ordered by: its stream, and whether that is captured."""
    turn, model = ["a stream", False], Attention()
    monkeypatch.setattr(native.PreparedLinear, "turn", lambda kernel: tuple(turn))
    for _ in range(2):
        model(torch.randn(2, 96))
    for changed in (["another", False], ["another", True], ["another", True]):
        model.k(x := torch.randn(2, 96))
        assert model.v._ready[5] == tuple(turn)
        ahead, same, turn[:] = model.v._ready[4], turn == changed, changed
        v = model.v(x)
        assert torch.equal(v, alone(model, x)[1]) and (v is ahead) == same
        model.q(x)


@torch.no_grad()
def test_a_layer_that_was_moved_is_followed_no_more(calls):
    model = Attention()
    for _ in range(2):
        model(torch.randn(2, 96))
    model.v.to("meta")
    k = model.k(x := torch.randn(2, 96))
    assert torch.equal(k, native.PreparedLinear(*model.k._decode_tables(), None, model.k.spec)(x, "a16"))
    assert model.k._followers == (model.q,) and calls[-1] == 2


@torch.no_grad()
def test_moved_layers_and_replicas_follow_none():
    """nn.DataParallel copies a module's attributes, and its replicas run on devices of their own."""
    model = Attention()
    for _ in range(2):
        model(torch.randn(2, 96))
    model.k(torch.randn(2, 96))
    replicas = [m._replicate_for_data_parallel() for m in (model.k, model.v)]
    assert model.k._followers and model.v._ready is not None
    assert all(not r._followers and r._ready is None for r in replicas)
    model.to("cpu")
    assert all(not m._followers and m._ready is None for m in model.children())


@torch.no_grad()
def test_small_layers_neither_lead_nor_follow(calls, monkeypatch):
    model = Attention()
    monkeypatch.setattr(native, "JOIN_FROM", model.v.idx.numel())
    assert max(model.q.idx.numel(), model.k.idx.numel()) < native.JOIN_FROM
    for first in (model.q, model.v):
        for _ in range(3):
            x = torch.randn(2, 96)
            first(x)
            assert torch.equal(model.v(x), alone(model, x)[1]) and torch.equal(model.k(x), alone(model, x)[0])
    assert calls == [] and not model.q._followers and not model.v._followers
