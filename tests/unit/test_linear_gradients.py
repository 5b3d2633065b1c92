"""Gradients through a packed layer: those of nn.Linear, without a dense weight that waits for backward."""
import contextlib

import pytest
import torch
from packed_cases import random_weight
from torch import nn

from gptvq import QuantSpec, VQLinear

SPEC = QuantSpec(40, 96, 2, 3, 16, 96, 32)


def pair(dtype=torch.float32):
    """The layer, and nn.Linear with its weight."""
    vq = VQLinear.from_weight(random_weight(SPEC), torch.randn(40).to(dtype).requires_grad_())
    return vq, vq.to_dense(dtype)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(96,), (5, 96), (2, 3, 96), (0, 96)], ids=str)
def test_they_are_those_of_nn_linear(shape, dtype, autocast):
    vq, dense = pair(dtype)
    x, grad, found = torch.randn(shape).to(dtype), None, []
    for layer in (vq, dense):
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
            y = layer(given)
        grad = torch.randn_like(y) if grad is None else grad
        y.backward(grad)
        found.append((y, given.grad, layer.bias.grad))
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(*found))


def test_backward_waits_for_no_dense_weight():
    model = nn.Sequential(pair()[0], nn.ReLU(), VQLinear.from_weight(random_weight(QuantSpec(24, 40, 2, 2, 8, 40))))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = model(torch.randn(3, 96, requires_grad=True))
    assert saved and not any(t.is_floating_point() and t.numel() in (40 * 96, 24 * 40) for t in saved)
    y.sum().backward()


@pytest.mark.parametrize("wanted", ["x", "bias"])
def test_of_one_alone(wanted):
    vq, dense = pair()
    x, found = torch.randn(3, 96), []
    for layer in (vq, dense):
        layer.bias.requires_grad_(wanted == "bias")
        given = x.clone().requires_grad_(wanted == "x")
        layer(given).square().sum().backward()
        found.append(given.grad if wanted == "x" else layer.bias.grad)
    assert torch.equal(*found)


def test_gradients_of_gradients():
    vq, dense = pair()
    x, twice = torch.randn(3, 96), []
    for layer in (vq, dense):
        given = x.clone().requires_grad_()
        first, = torch.autograd.grad(layer(given).pow(3).sum(), given, create_graph=True)
        first.square().sum().backward()
        twice.append(given.grad)
    torch.testing.assert_close(*twice, rtol=1e-4, atol=1e-5 * float(twice[1].abs().max()))


def test_a_weight_changed_before_backward_is_an_error():
    vq, _ = pair()
    y = vq(torch.randn(3, 96, requires_grad=True))
    vq.gs.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_of_a_layer_made_in_inference_mode():
    with torch.inference_mode():
        vq = VQLinear.from_weight(random_weight(SPEC))
    x = torch.randn(3, 96, requires_grad=True)
    vq(x).sum().backward()
    torch.testing.assert_close(x.grad, vq.dequantize().sum(0).expand(3, -1))
