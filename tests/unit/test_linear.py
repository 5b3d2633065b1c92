"""VQLinear in the place of nn.Linear."""
import copy
import io

import pytest
import torch
from packed_cases import compiled_noting, random_weight
from torch import nn

import gptvq
from gptvq import ConfigError, FormatError, QuantSpec, VQLinear
from gptvq.backends import native

SPECS = {
    "2D K16": QuantSpec(20, 72, 2, 2, 8, 32),
    "2D K256 scales": QuantSpec(33, 64, 2, 4, 16, 64, scale_block=16),
    "1D K8": QuantSpec(16, 31, 1, 3, 16, 32),
    "1D K16 svd": QuantSpec(24, 64, 1, 4, 8, 32, svd_rank=8),
    "4D K256": QuantSpec(40, 50, 4, 2, 40, 52),
}


def layer(name="2D K16", bias=True, seed=0):
    spec = SPECS[name]
    return VQLinear.from_weight(random_weight(spec, seed), nn.Parameter(torch.randn(spec.rows)) if bias else None, name="some.layer")


ROUNDING = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
ERROR = {"a16": 1e-4, "a8": 1.5e-2, "fp32": 1e-6}


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_against_float64(name, bias, dtype):
    vq = layer(name, bias)
    weight, constant = vq.dequantize().double(), vq.bias.detach().double() if bias else 0
    for leading in ((), (3,), (2, 5), (2, 1, 3), (0,), (300,)):
        x = torch.randn(*leading, vq.in_features).to(dtype)
        want = x.double() @ weight.T + constant
        for vq.activations in ERROR:
            with torch.no_grad():
                y = vq(x)
            assert y.dtype == dtype and y.shape == (*leading, vq.out_features)
            assert float((y - want).norm()) <= (ROUNDING[dtype] + ERROR[vq.activations] + (leading == (300,)) * ROUNDING[dtype]) * float(want.norm())


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("tiles", [True, False])
def test_many_tokens_in_parts(tiles, dtype, monkeypatch):
    """On a CPU: some rows at a time, unpacked into memory for 16 of them here; or tokens in parts, where tiles are the faster way."""
    monkeypatch.setattr(native, "_DENSE_BYTES", 1)
    monkeypatch.setattr(native.PreparedLinear, "_tiles_win", lambda *_: tiles)
    for bias in (True, False):
        vq = layer(bias=bias)
        for leading in ((native.DENSE_FROM,), (2, native.DENSE_FROM // 2 + 3)):
            x = torch.randn(*leading, vq.in_features + 1)[..., 1:].to(dtype)
            want = nn.functional.linear(x.double(), vq.dequantize(dtype).double(), vq.bias.detach().to(dtype).double() if bias else None)
            with torch.no_grad():
                y = vq(x)
            assert y.dtype == dtype and y.shape == want.shape
            assert float((y - want).norm()) <= (2 * ROUNDING[dtype] + tiles * ERROR["a16"]) * float(want.norm())


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("name", SPECS)
def test_with_gradients_it_equals_nn_linear(name, dtype):
    vq = layer(name)
    dense = nn.Linear(vq.in_features, vq.out_features, dtype=dtype)
    dense.weight.data, dense.bias.data = vq.packed.dequantize(dtype), vq.bias.data.to(dtype)
    for leading in ((), (2, 5), (0,)):
        x = torch.randn(*leading, vq.in_features).to(dtype)
        assert torch.equal(vq(x), dense(x)) and torch.equal(vq.to_dense(dtype)(x), dense(x))


def test_changes_in_place_are_seen():
    vq = layer("2D K256 scales")
    x = torch.randn(2, 64)
    with torch.no_grad():
        for _ in range(300):                            # more versions than small integers that Python keeps
            vq.gs.mul_(1)
        before, kernel = vq(x), vq._kernel
        assert torch.equal(vq(x), before) and vq._kernel is kernel
        vq.gs.mul_(2)
        vq.bias.mul_(2)
        assert torch.allclose(vq(x), 2 * before, rtol=1e-4)
        vq.bias.data = vq.bias.data.bfloat16()
        vq(x)
        vq.bias.zero_()
        assert torch.allclose(vq(x), x @ vq.dequantize().T, rtol=1e-3, atol=1e-4)


def test_a_replica_without_parameters_keeps_its_bias():
    """As nn.DataParallel makes them: parameters become plain attributes."""
    vq = VQLinear.from_weight(random_weight(QuantSpec(24, 64, 2, 2, 8, 64)), torch.randn(24))
    replica = vq._replicate_for_data_parallel()
    replica.bias = vq.bias.detach()
    with torch.no_grad():
        x = torch.randn(2, 64)
        assert "bias" not in replica._parameters and torch.equal(replica(x), vq(x))


def test_unknown_activations_are_refused():
    vq = layer()
    vq.activations = "a4"
    with pytest.raises(ConfigError, match="activations: got 'a4', need one of a16, a8, fp32"), torch.no_grad():
        vq(torch.randn(1, 72))


@pytest.mark.parametrize("name", SPECS)
def test_compiled_is_one_graph_and_equals_eager(name):
    model = nn.Sequential(layer(name), nn.ReLU())
    compiled, graphs = compiled_noting(model)
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(2, 3, model[0].in_features)
            assert torch.equal(compiled(x), model(x))
    assert sum("gptvq.linear" in str(node.target) for graph in graphs for node in graph.graph.nodes) == len(graphs) <= 2


def test_operator_follows_the_rules_of_torch_library():
    vq = layer("2D K256 scales")
    args = (*vq._decode_tables(), vq.bias.detach().requires_grad_(), vq.spec.key, "fp32")
    torch.library.opcheck(torch.ops.gptvq.linear.default, (torch.randn(3, 64, requires_grad=True), *args))
    with pytest.raises(ConfigError, match="need torch.float32, float16 or bfloat16 with last dimension 64"):
        torch.ops.gptvq.linear(torch.randn(3, 65), *args)


def test_buffers_are_the_packed_ones():
    for name in SPECS:
        vq = layer(name)
        state = vq.state_dict()
        assert {k: (tuple(t.shape), str(t.dtype)[6:]) for k, t in state.items() if k != "bias"} == vq.spec.buffer_shapes()
        assert sum(t.numel() * t.element_size() for k, t in state.items() if k != "bias") == vq.spec.nbytes == vq.packed.nbytes
        assert [k for k, _ in vq.named_parameters()] == ["bias"]


@pytest.mark.parametrize("name", SPECS)
def test_state_dict_round_trip(name):
    one, other = layer(name, seed=1), layer(name, seed=2)
    x = torch.randn(4, one.in_features)
    assert not torch.equal(one(x), other(x))
    other.load_state_dict(one.state_dict())             # after a forward: nothing stale may be kept
    assert torch.equal(one(x), other(x))
    empty = VQLinear(one.spec, bias=True)
    empty(x)
    empty.load_state_dict(copy.deepcopy(one.state_dict()), assign=True)
    assert torch.equal(one(x), empty(x))
    file = io.BytesIO()
    from safetensors.torch import load, save
    file.write(save(one.state_dict()))
    assert all(torch.equal(t, one.state_dict()[k]) for k, t in load(file.getvalue()).items())


def test_state_dict_of_another_dtype_or_shape_is_refused():
    vq = layer("2D K256 scales")
    for buffer, wrong in (("idx", vq.idx.int()), ("gs", vq.gs.float()), ("sz", vq.sz.float()), ("cb", vq.cb[1:])):
        with pytest.raises(RuntimeError, match=buffer):
            layer("2D K256 scales").load_state_dict({**vq.state_dict(), buffer: wrong})


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.double, nn.Module.bfloat16, lambda m: m.to(torch.float16)])
def test_casts_touch_the_bias_only(name, cast):
    vq = layer(name)
    x = torch.randn(3, vq.in_features)
    before, kinds = vq.dequantize(), {k: t.dtype for k, t in vq.named_buffers()}
    cast(vq)
    assert {k: t.dtype for k, t in vq.named_buffers()} == kinds and vq.bias.dtype != torch.float32
    assert torch.equal(vq.dequantize(), before)
    assert vq(x.half()).dtype == torch.float16


def test_moves_between_devices():
    vq = layer("2D K256 scales")
    want = vq.dequantize()
    assert all(t.is_meta for t in copy.deepcopy(vq).to("meta").state_dict().values())
    empty = VQLinear(vq.spec, bias=True, device="meta").to_empty(device="cpu")
    assert {k: t.dtype for k, t in empty.named_buffers()} == {k: t.dtype for k, t in vq.named_buffers()}
    empty.load_state_dict(vq.state_dict())
    assert torch.equal(empty.dequantize(), want)


@pytest.mark.gpu
def test_on_a_gpu():
    for name in SPECS:
        vq = layer(name)
        x = torch.randn(4, vq.in_features)
        want = vq(x)
        moved = copy.deepcopy(vq).cuda()
        assert torch.equal(moved.dequantize().cpu(), vq.dequantize())
        assert torch.allclose(moved(x.cuda()).cpu(), want, rtol=1e-4, atol=1e-4)
        assert torch.equal(moved.cpu()(x), want)


def test_gradients_reach_the_input_and_not_the_weight():
    vq = layer("1D K8")
    x = torch.randn(2, 3, vq.in_features, requires_grad=True)
    vq(x).square().sum().backward()
    dense = vq.to_dense()
    assert not dense.weight.requires_grad
    y = x.detach().clone().requires_grad_()
    dense(y).square().sum().backward()
    assert torch.equal(x.grad, y.grad) and torch.equal(vq.bias.grad, dense.bias.grad)
    assert all(not t.requires_grad for t in vq.buffers())


def test_wrong_inputs_are_named():
    vq = layer("2D K16")
    for x in (torch.randn(2, 71), torch.randn(2, 72).double(), torch.zeros(2, 72, dtype=torch.long), torch.tensor(1.0)):
        with pytest.raises(ConfigError) as error:
            vq(x)
        assert all(part in str(error.value) for part in ("some.layer", str(x.dtype), str(tuple(x.shape)), "72"))
    with pytest.raises(ConfigError, match=r"bias \(3,\), need \(20,\)"):
        VQLinear.from_weight(random_weight(SPECS["2D K16"]), torch.zeros(3))
    vq.gs = vq.gs.float()
    with pytest.raises(FormatError, match="some.layer.gs"):
        vq.check()


def test_repr_tells_shape_format_and_size():
    assert repr(layer("2D K256 scales")) == (
        "VQLinear(in_features=64, out_features=33, bias=True, 2D K256 in groups of 16x64, scale_block=16, "
        f"{SPECS['2D K256 scales'].bits_per_value:.3f} bits per value)")


def test_deep_copies_and_weight_are_independent():
    vq = layer("2D K256 scales")
    x = torch.randn(2, 64)
    want = vq(x)
    other = copy.deepcopy(vq)
    other.cb.zero_()
    assert torch.equal(vq(x), want) and torch.equal(other(x), other.bias.detach().expand(2, -1))
    with torch.no_grad():
        vq(x)
        fresh = copy.deepcopy(vq)                       # after the kernel has been prepared
        fresh.cb.zero_()
        assert not torch.equal(vq(x), fresh(x)) and torch.equal(fresh(x), fresh.bias.expand(2, -1))
    vq.weight.zero_()
    assert torch.equal(vq(x), want) and torch.equal(vq.weight, vq.dequantize())
    assert gptvq.VQLinear is VQLinear
