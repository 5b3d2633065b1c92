"""The short way of a call on the CPU: C++ from end to end, wherever it computes what the way by Python does, and nowhere else."""
import gc
import subprocess
import sys
import weakref

import pytest
import torch
from packed_cases import random_weight
from torch import nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gptvq import QuantSpec, VQLinear, linear
from gptvq.backends import native
from gptvq.errors import ConfigError

pytestmark = pytest.mark.skipif(not native.serves(torch.device("cpu")), reason="gptvq._C is not built here")
PLAIN, SCALES = QuantSpec(64, 96, 2, 2, 16, 32), QuantSpec(40, 96, 1, 3, 16, 96, 32)


@torch.no_grad()
def made(spec=PLAIN, bias=True):
    """A layer that has been called once, as a call is what prepares it."""
    layer = VQLinear.from_weight(random_weight(spec), torch.randn(spec.rows) if bias else None)
    layer(torch.randn(1, spec.cols))
    assert layer._call is not None
    return layer


def short(layer, x):
    return layer._call(x, layer.activations, layer._buffers, layer._parameters)


def by_python(layer, x):
    """What the prepared kernel gives without it."""
    return native.PreparedLinear(*layer._decode_tables(), layer.bias, layer.spec)(x, layer.activations)


@torch.no_grad()
@pytest.mark.parametrize("spec", [PLAIN, SCALES, QuantSpec(20, 64, 2, 3, 16, 64), QuantSpec(48, 64, 4, 3, 16, 64)], ids=["2d", "1d", "ragged", "4d"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activations", ["a16", "a8", "fp32"])
def test_it_computes_the_same(spec, bias, activations):
    layer = made(spec, bias)
    layer.activations = activations
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for shape in ((), (1,), (3,), (1, 1), (2, 5), (1, 2, 1, 3), (511,)):
            x = torch.randn(*shape, spec.cols).to(dtype)
            y = short(layer, x)
            assert y.dtype == dtype and y.shape == (*shape, spec.rows) and y.is_contiguous() and type(y) is torch.Tensor
            assert torch.equal(y, by_python(layer, x)) and torch.equal(layer(x), y)


@torch.no_grad()
def test_views_that_lie_in_one_piece_are_taken():
    layer, x = made(), torch.randn(6, 96)
    for view in (x[2:5], x.view(2, 3, 96)[1], x[1:2].T.T, x[:, None], x[3], torch.as_strided(x, (1, 96), (7, 1), 5), nn.Parameter(x)):
        assert torch.equal(short(layer, view), by_python(layer, view.contiguous()))


def flipped(x):
    return torch.complex(torch.zeros(3, 96), -x).conj().imag       # with its negative bit set


def own_type(x):
    class Mine(torch.Tensor):
        pass
    return x.as_subclass(Mine)


REFUSED = {
    "every second": lambda x: torch.randn(6, 96)[::2], "transposed": lambda x: torch.randn(96, 3).T, "expanded": lambda x: x[:1].expand(3, 96),
    "negative": flipped, "of its own type": own_type, "none": lambda x: x[:0], "many": lambda x: torch.randn(512, 96)}


@torch.no_grad()
@pytest.mark.parametrize("name", REFUSED)
def test_other_inputs_go_by_python(name):
    layer, x = made(), REFUSED[name](torch.randn(3, 96))
    assert short(layer, x) is None
    want = by_python(layer, x.clone().as_subclass(torch.Tensor).resolve_neg().contiguous()) if len(x) else torch.empty(0, 64)
    torch.testing.assert_close(layer(x).as_subclass(torch.Tensor), want, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("x", [torch.randn(3, 95), torch.randn(3, 96).double(), torch.ones(3, 96, dtype=torch.int32), torch.tensor(1.0),
                               torch.randn(3, 96).to(torch.complex64)], ids=["columns", "double", "integers", "no dimension", "complex"])
def test_bad_inputs_are_told_by_python(x):
    layer = made()
    assert short(layer, x) is None
    with pytest.raises(ConfigError, match="VQLinear: got x"):
        layer(x)


@torch.no_grad()
def test_what_has_no_memory_goes_by_python():
    layer = made()
    for x in (torch.randn(3, 96, device="meta"), torch.randn(3, 96).to_sparse(), 3.5, None):
        assert short(layer, x) is None


def test_gradients_go_by_python():
    layer, x = made(), torch.randn(3, 96)
    layer.bias.requires_grad_()
    assert short(layer, x) is None
    layer.bias.requires_grad_(False)
    assert short(layer, x) is not None and short(layer, x.clone().requires_grad_()) is None
    layer(x := x.clone().requires_grad_()).sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        assert not short(layer, x).requires_grad


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.last = function
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_what_watches_operators_sees_them():
    layer, x = made(), torch.randn(3, 96)
    with Seen() as seen:
        assert short(layer, x) is None
        layer(x)
    assert "gptvq" in str(seen.last)
    with torch.device("meta"):                          # a mode of functions, not of operators
        assert short(layer, x).device == x.device
    inside = []
    torch.vmap(lambda row: inside.append(short(layer, row)) or layer(row))(x)
    with forward_ad.dual_level():
        inside.append(short(layer, x))
    torch.jit.trace(lambda t: inside.append(short(layer, t)) or layer(t), (x,), check_trace=False)
    assert inside == [None] * 3 and short(layer, x) is not None


CHANGES = {
    "scales in place": lambda layer: layer.gs.mul_(2), "bias in place": lambda layer: layer.bias.add_(1), "no bias": lambda layer: setattr(layer, "bias", None),
    "other bias": lambda layer: layer._parameters.update(bias=nn.Parameter(torch.randn(64))),
    "memory of the bias": lambda layer: setattr(layer.bias, "data", torch.randn(64)),
    "other indices": lambda layer: layer._buffers.update(idx=layer.idx.flip(0)), "no scales": lambda layer: layer._buffers.update(gs=None)}


@torch.no_grad()
@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_layer_is_prepared_again(name):
    layer, x = made(), torch.randn(3, 96)
    before, call = layer(x), layer._call
    CHANGES[name](layer)
    assert call(x, "a16", layer._buffers, layer._parameters) is None
    if name != "no scales":
        y = layer(x)
        assert not torch.equal(y, before) and torch.equal(y, by_python(layer, x)) and torch.equal(short(layer, x), y)


@torch.no_grad()
def test_codebooks_are_read_where_they_lie():
    layer, x = made(), torch.randn(3, 96)
    before = layer(x)
    layer.cb.neg_()
    assert torch.equal(short(layer, x), by_python(layer, x)) and not torch.equal(short(layer, x), before)


@torch.no_grad()
def test_activations_are_looked_at():
    layer, x = made(), torch.randn(3, 96)
    layer.activations = "".join(["a", "8"])             # equal to the name, but not the same object
    assert torch.equal(short(layer, x), by_python(layer, x))
    layer.activations = "a4"
    assert short(layer, x) is None
    with pytest.raises(ConfigError, match="a4"):
        layer(x)
    for arguments in ((x,), (x, "a16", {}), (x, "a16", None, {}), (x, "a16", {}, [])):
        with pytest.raises(TypeError, match="x, activations, buffers and parameters"):
            layer._call(*arguments)
    assert layer._call(x, 3, layer._buffers, layer._parameters) is None and layer._call(x, "a16", {}, {}) is None


class Interrupted(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if "new_empty" in str(function):
            raise self.error
        return function(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_is_not_lost(error):
    layer, x = made(), torch.randn(3, 96)
    with Interrupted() as mode:
        mode.error = error
        if error is RuntimeError:
            assert short(layer, x) is None
        with pytest.raises(error):
            layer(x)
    assert short(layer, x) is not None


@torch.no_grad()
def test_nothing_is_kept_or_lost():
    layer, x = made(), torch.randn(3, 96)
    counts = lambda: [sys.getrefcount(o) for o in (x, layer.bias, layer.idx, layer.gs, None, layer._buffers, torch.Tensor)]
    short(layer, x)
    gc.collect()
    before = counts()
    for _ in range(200):
        short(layer, x)
        short(layer, x[:, :3])
        short(layer, None)
    assert all(abs(a - b) < 20 for a, b in zip(before, counts()))
    tensors, call = [weakref.ref(layer.idx), weakref.ref(layer.bias)], layer._call
    buffers, parameters = layer._buffers, layer._parameters
    want = layer(x)
    layer = weakref.ref(layer)
    assert layer() is None and torch.equal(call(x, "a16", buffers, parameters), want)       # it keeps what it reads
    del buffers, parameters, call
    gc.collect()
    assert [t() for t in tensors] == [None, None]


@torch.no_grad()
@pytest.mark.parametrize("name", ["bias", "idx"])
def test_cycles_through_it_are_collected(name):
    layer = made()
    getattr(layer, name).loader = layer.dequantize      # as loaders of weights do
    gone = weakref.ref(layer)
    del layer
    gc.collect()
    assert gone() is None


@torch.no_grad()
def test_a_kernel_of_a_layer_that_changed_since_is_not_taken(monkeypatch):
    """As where another thread changes it: what was made before is filed under what it was made from."""
    layer, x = made(), torch.randn(3, 96)
    old, prepare = layer._kernel[0], linear.ops.prepare_linear
    other = VQLinear.from_weight(random_weight(PLAIN, 1))

    def meanwhile(*arguments):
        kernel = prepare(*arguments)
        layer._buffers["idx"] = other.idx
        return kernel

    with monkeypatch.context() as patch:
        patch.setattr(linear.ops, "prepare_linear", meanwhile)
        layer._forget()
        layer(x)
    assert short(layer, x) is None and torch.equal(layer(x), by_python(layer, x)) and torch.equal(short(layer, x), by_python(layer, x))
    layer._go_alone(old, linear._PATIENCE)
    assert torch.equal(layer(x), by_python(layer, x))


@torch.no_grad()
def test_large_layers_take_it_when_nobody_joins(monkeypatch):
    monkeypatch.setattr(native, "JOIN_FROM", 0)
    monkeypatch.setattr(linear, "_leader", (None, None))
    layer, other = (VQLinear.from_weight(random_weight(PLAIN, seed)) for seed in (0, 1))
    made = []
    caller = native.PreparedLinear.caller
    monkeypatch.setattr(native.PreparedLinear, "caller", lambda *arguments: made.append(1) or caller(*arguments))
    for mode, patience in ((torch.no_grad(), linear._PATIENCE), (torch.inference_mode(), 1)):
        layer._forget()
        with mode:
            for step in range(patience + 2):
                assert (layer._call is not None) == (step >= patience)
                assert torch.equal(layer(x := torch.randn(2, 96)), by_python(layer, x))
            layer(torch.randn(96, 2).T)
    assert made == [1, 1]
    layer._forget()
    for step in range(linear._PATIENCE + 2):
        x = torch.randn(2, 96)
        assert torch.equal(layer(x), by_python(layer, x)) and torch.equal(other(x), by_python(other, x))
    assert layer._call is None and layer._followers == (other,)


def test_a_pytorch_that_hands_out_no_tensors():
    code = """
import torch
del torch.Tensor.__dlpack_c_exchange_api__
from gptvq import QuantSpec, VQLinear
layer = VQLinear(QuantSpec(64, 96, 2, 2, 16, 32))
with torch.no_grad():
    y = layer(torch.randn(3, 96))
assert y.shape == (3, 64) and layer._kernel is not None and layer._call is None
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
