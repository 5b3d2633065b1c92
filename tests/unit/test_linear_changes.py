"""VQLinear keeps what it computed from its buffers, and must notice when they change; tracers and transformations must see it."""
import copy
import gc
import pickle
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from packed_cases import random_weight
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import gptvq
from gptvq import QuantSpec, VQLinear, ops
from gptvq.backends import native

pytestmark = pytest.mark.skipif(not native.serves(torch.device("cpu")), reason="gptvq._C is not built here")
SPECS = {"plain": QuantSpec(40, 96, 2, 2, 16, 32), "scales": QuantSpec(40, 96, 2, 3, 16, 96, 32), "svd": QuantSpec(40, 96, 1, 3, 16, 32, 0, 3)}
CHANGES = [(name, buffer, how) for name, spec in SPECS.items() for buffer in (*spec.buffer_shapes(), "bias") for how in
           ("set", "copy")]


def layer(spec, seed=0):
    return VQLinear.from_weight(random_weight(spec, seed), torch.randn(spec.rows, generator=torch.Generator().manual_seed(seed)))


def near(got, x, like):
    """Within the error of a16 of what a new layer with the same buffers gives."""
    want = VQLinear.from_weight(like.packed, like.bias).to_dense()(x)
    return bool((got - want).norm() < 3e-4 * want.norm())


@torch.no_grad()
@pytest.mark.parametrize("name, buffer, how", CHANGES)
def test_a_change_of_any_buffer_is_seen(name, buffer, how):
    vq, other = layer(SPECS[name]), layer(SPECS[name], 1)
    x, new = torch.randn(2, 96), getattr(other, buffer)
    assert near(vq(x), x, vq)
    if how == "set":
        setattr(vq, buffer, new)
    else:
        getattr(vq, buffer).copy_(new)
    assert near(vq(x), x, vq) and torch.equal(vq.dequantize(), VQLinear.from_weight(vq.packed).dequantize())


@torch.no_grad()
@pytest.mark.parametrize("name", SPECS)
def test_buffers_of_a_functional_call(name):
    vq, other, x = layer(SPECS[name]), layer(SPECS[name], 1), torch.randn(2, 96)
    for _ in range(2):
        assert near(vq(x), x, vq) and near(torch.func.functional_call(vq, dict(other.state_dict()), x), x, other)
    for buffer, tensor in other.state_dict().items():
        some = VQLinear.from_weight(random_weight(SPECS[name]), vq.bias)
        setattr(some, buffer, nn.Parameter(tensor, requires_grad=False) if buffer == "bias" else tensor)
        assert near(vq(x), x, vq) and near(torch.func.functional_call(vq, {buffer: tensor}, x), x, some)


@torch.no_grad()
def test_first_calls_of_several_threads():
    before, x = sys.getswitchinterval(), torch.randn(2, 96)
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(3) as threads:
            for _ in range(300):
                vq, start = layer(SPECS["scales"]), threading.Barrier(3)
                calls = [threads.submit(lambda vq=vq, start=start: start.wait() * 0 + vq(x)) for _ in range(3)]
                assert torch.equal(calls[0].result(), calls[1].result()) and near(calls[2].result(), x, vq)
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize("name", SPECS)
def test_called_first_in_inference_mode_and_trained_through_then(name):
    vq, x = layer(SPECS[name]), torch.randn(2, 96, requires_grad=True)
    with torch.inference_mode():
        vq(x)
    ops.linear(x, *vq._decode_tables(), vq.bias, vq.spec).sum().backward()
    torch.testing.assert_close(x.grad, vq.dequantize().sum(0).expand(2, -1))


def test_subclasses_and_pickles():
    """Of a class that sets an attribute first, of a tensor's subclass, and a pickle without what is kept."""
    class Own(VQLinear):
        def __init__(self, *args, **kwargs):
            self.own = 1
            super().__init__(*args, **kwargs)

    class Kind(torch.Tensor):
        pass

    x = torch.randn(2, 96)
    vq = Own.from_weight(random_weight(SPECS["scales"]))
    old = copy.deepcopy(vq)
    for name in ("_tables", "_kernel", "_ready"):
        old.__dict__.pop(name, None)
    with torch.no_grad():
        assert near(vq(x), x, vq) and torch.equal(old(x), vq(x)) and torch.equal(pickle.loads(pickle.dumps(layer(SPECS["svd"])))(x), layer(SPECS["svd"])(x))
        vq.idx = vq.idx.as_subclass(Kind)
        assert torch.equal(vq(x), old(x))


@torch.no_grad()
@pytest.mark.parametrize("buffer", ["idx", "cb", "gs"])
def test_a_buffer_that_is_a_view_with_gaps_may_change(buffer):
    vq, new = layer(SPECS["plain"]), getattr(layer(SPECS["plain"], 1), buffer)
    tensor = getattr(vq, buffer)
    setattr(vq, buffer, torch.stack([tensor, tensor], -1)[..., 0])
    x = torch.randn(2, 96)
    assert near(vq(x), x, vq)
    getattr(vq, buffer).copy_(new)
    assert near(vq(x), x, vq)


@torch.no_grad()
def test_a_bias_with_new_memory():
    vq, x = layer(SPECS["plain"]), torch.randn(2, 96)
    vq(x)
    nn.utils.vector_to_parameters(torch.randn(40), [vq.bias])
    assert near(vq(x), x, vq)


@torch.no_grad()
@pytest.mark.parametrize("change", [lambda b: b.gs.mul_(2), lambda b: b.bias.zero_(), lambda b: setattr(b, "activations", "fp32")])
def test_what_was_computed_ahead_is_not_taken_by_a_layer_that_changed(change, monkeypatch):
    monkeypatch.setattr(native, "JOIN_FROM", 0)
    a, b = layer(SPECS["plain"]), layer(SPECS["scales"], 1)
    for _ in range(3):
        x = torch.randn(2, 96)
        a(x), b(x)
    a(x := torch.randn(2, 96))
    assert b._ready is not None
    change(b)
    got, dense = b(x), b.to_dense()(x)
    assert near(got, x, b) and (b.activations == "a16" or float((got - dense).norm() / dense.norm()) < 1e-6)


@torch.no_grad()
def test_no_layer_outlives_its_model():
    vq, x = layer(SPECS["plain"]), torch.randn(2, 96)
    vq(x)
    gone = weakref.ref(vq)
    del vq
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("name", SPECS)
def test_tracers_record_it(name):
    vq, x, y = layer(SPECS[name]), torch.randn(3, 96), torch.randn(3, 96)
    with torch.no_grad():
        assert near(make_fx(vq)(x)(y), y, vq) and near(torch.jit.trace(vq, x)(y), y, vq)


@pytest.mark.parametrize("called_before", [False, True])
def test_derivatives_and_batches_of_torch_func(called_before):
    vq, x = layer(SPECS["scales"]), torch.randn(3, 96)
    dense = vq.to_dense()
    if called_before:
        vq(x)
    tangent = torch.randn(3, 96)
    with forward_ad.dual_level():
        torch.testing.assert_close(forward_ad.unpack_dual(vq(forward_ad.make_dual(x, tangent))).tangent, tangent @ dense.weight.T)
    torch.testing.assert_close(torch.func.grad(lambda x: vq(x).square().sum())(x), torch.func.grad(lambda x: dense(x).square().sum())(x))
    torch.testing.assert_close(torch.func.jacfwd(vq)(x[0]), dense.weight.detach())
    torch.testing.assert_close(torch.vmap(vq)(x), dense(x))
    with torch.no_grad():
        assert near(vq(x), x, vq)


def test_gradient_of_one_vector_through_the_operator():
    vq, x = layer(SPECS["plain"]), torch.randn(96, requires_grad=True)
    vq.bias.requires_grad_()
    ops.linear(x, *vq._decode_tables(), vq.bias, vq.spec).sum().backward()
    torch.testing.assert_close(vq.bias.grad, torch.ones(40))
    torch.testing.assert_close(x.grad, vq.dequantize().sum(0))


def test_a_refused_state_changes_nothing():
    vq, bad = layer(SPECS["plain"]), layer(SPECS["plain"], 1).state_dict()
    before = {name: t.clone() for name, t in vq.state_dict().items()}
    for broken in (bad["gs"] * torch.nan, bad["gs"].float()):
        with pytest.raises(RuntimeError, match="gs: "):
            vq.load_state_dict({**bad, "gs": broken})
        assert torch.equal(vq.gs, before["gs"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_solving_and_decoding_do_not_depend_on_the_default_type(dtype):
    W, H = torch.randn(32, 64), torch.eye(64)
    want, vq = gptvq.quantize_weight(W, H, "2d-2.25"), random_weight(SPECS["svd"])
    dense = vq.dequantize()
    torch.set_default_dtype(dtype)
    try:
        got, decoded = gptvq.quantize_weight(W, H, "2d-2.25"), vq.dequantize()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got.dequantize(), want.dequantize()) and torch.equal(decoded, dense)
