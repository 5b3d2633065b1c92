"""Triton's kernels on packed weights against the reference: every format, ragged shapes, all float types, few and many tokens."""
import gc
import itertools

import pytest
import torch
from packed_cases import (
    SHAPES,
    SPECS,
    random_codes,
    random_tables,
    random_weight,
    spec_id,
)

from gptvq import VQLinear, ops
from gptvq.backends import reference, triton
from gptvq.spec import FORMATS, QuantSpec

SOME = [spec for spec in SPECS if (spec.rows, spec.cols, spec.group_rows) in {SHAPES[i][:3] for i in (1, 3, 4, 5)}]
ROUNDING = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 8e-3}      # the interpreter cuts bfloat16 off instead of rounding


def on(device, *tensors):
    return [t if t is None else t.to(device) for t in tensors]


def packed(spec, device, seed=0):
    return on(device, reference.pack_codes(random_codes(spec, seed), spec), *random_tables(spec, seed))


def relative(got, want):
    return float((got.cpu().double() - want).norm() / want.norm())


@pytest.mark.parametrize("spec", SOME, ids=spec_id)
def test_dequantize_equals_the_reference(spec, device):
    weight = packed(spec, device)
    want = reference.dequantize(*on("cpu", *weight), spec, torch.float32)
    for dtype in ROUNDING:
        got = triton.dequantize(*weight, spec, dtype).cpu()
        assert got.dtype == dtype
        if dtype == torch.bfloat16:
            assert ((got.double() - want).abs() <= 2**-7 * want.abs()).all()
        else:
            assert torch.equal(got, want.to(dtype))


@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("spec", SOME, ids=spec_id)
def test_linear(spec, tokens, device, launched):
    weight = packed(spec, device)
    dense = reference.dequantize(*on("cpu", *weight), spec, torch.float32).double()
    generator = torch.Generator().manual_seed(tokens)
    x, bias = torch.randn(tokens, spec.cols, generator=generator), torch.randn(spec.rows, generator=generator)
    prepared = triton.prepare_linear(*weight, bias.to(device), spec)
    got = prepared(x.to(device), "a16")
    assert relative(got, x.double() @ dense.T + bias) <= 2e-6
    words = "3 words " * (spec.code_bits in (3, 6, 12))
    assert launched == ["vq_gemm float32 M=32" if tokens == 20 else f"vq_gemv {words}M={1 if tokens == 1 else 4}"]


FORMS = [QuantSpec(40, 70, *form, 16, 32, scale) for form, scale in itertools.product(sorted(FORMATS), (0, 32))]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", FORMS, ids=spec_id)
def test_linear_in_half_types(spec, dtype, device):
    weight = packed(spec, device)
    dense = reference.dequantize(*on("cpu", *weight), spec, torch.float32).double()
    prepared = triton.prepare_linear(*weight, None, spec)
    for tokens in (2, 17):
        x = torch.randn(tokens, spec.cols, generator=torch.Generator().manual_seed(1)).to(dtype)
        got = prepared(x.to(device), "a16")
        assert got.dtype == dtype and relative(got, x.double() @ dense.T) <= ROUNDING[dtype]


@pytest.mark.parametrize("tokens, kernel", [(0, None), (2, "vq_gemv M=2"), (8, "vq_gemv M=8"), (9, "vq_gemm float32 M=16"),
                                            (64, "vq_gemm float32 M=64"),
                                            (100, "vq_gemm float32 M=64"), (256, "vq_gemm float32 M=64"), (257, "dequantize")])
def test_kernel_by_number_of_tokens(tokens, kernel, device, launched):
    spec = QuantSpec(33, 45, 2, 2, 8, 32, 16)
    weight = packed(spec, device)
    x = torch.randn(tokens, 45, generator=torch.Generator().manual_seed(1))
    got = triton.linear(x.to(device), *weight, None, spec, "a16").cpu()
    want = reference.linear(x, *on("cpu", *weight), None, spec, "a16")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()) if tokens else 0)
    assert launched == ([kernel] if kernel else [])


def test_rows_and_tokens_beyond_the_result_are_not_written(device, monkeypatch):
    """y lies in the middle of a larger buffer; so does x, at an address that vector loads cannot use."""
    spec = QuantSpec(37, 101, 2, 3, 7, 48, 16)
    weight = packed(spec, device)
    x = torch.full((3 * 101 + 2,), torch.nan, device=device)[1:-1].view(3, 101).normal_()
    prepared = triton.prepare_linear(*weight, None, spec)
    want = x.cpu().double() @ reference.dequantize(*on("cpu", *weight), spec, torch.float32).double().T
    memory, new_empty = torch.full((3 * 37 + 128,), 123.0, device=device), torch.Tensor.new_empty
    for tokens in (1, 3):
        y = memory[64 : 64 + 37 * tokens].view(tokens, 37)
        monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, shape, y=y, **kw: new_empty(self, shape, **kw) if kw else y)
        got = prepared(x[:tokens], "a16")
        assert got is y and relative(got, want[:tokens]) <= 2e-6
        assert (memory[:64] == 123).all() and (memory[64 + 37 * tokens :] == 123).all()


@pytest.mark.parametrize("form", sorted(FORMATS), ids=str)
def test_vqlinear_with_every_kind_of_input(form, device, force):
    """Leading dimensions, a transposed input, a bias, compiled: as nn.Linear with the dequantized weight."""
    spec = QuantSpec(40, 64, *form, 8, 32, 16)
    vq = VQLinear.from_weight(random_weight(spec), torch.randn(40)).to(device)
    force()
    with torch.no_grad():
        dense = vq.to_dense()
        for x in (torch.randn(64), torch.randn(2, 3, 64), torch.randn(64, 5).T):
            x = x.to(device)
            torch.testing.assert_close(vq(x), dense(x), rtol=1e-4, atol=1e-5 * float(dense(x).abs().max()))
        torch._dynamo.reset()
        compiled = torch.compile(vq, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), vq(x))


def test_the_operator_keeps_no_tensor(device, force):
    """What it keeps would stay in the memory of the CUDA graph that it was first called for."""
    spec = QuantSpec(20, 32, 2, 2, 8, 32)
    weight, x, bias = packed(spec, device), torch.randn(1, 32, device=device), torch.randn(20, device=device).half()
    force()
    held = {id(t) for t in gc.get_objects() if type(t) is torch.Tensor}
    ops.linear(x, *weight, bias, spec)
    assert all(id(t) in held for t in gc.get_objects() if type(t) is torch.Tensor)


def test_changes_of_the_tensors_are_seen(device, force):
    spec = QuantSpec(20, 32, 2, 2, 8, 32)
    weight, x = packed(spec, device), torch.randn(1, 32, device=device)
    force()
    before = ops.linear(x, *weight, None, spec)
    assert torch.equal(ops.linear(x, *weight, None, spec), before)
    weight[2].mul_(2)
    torch.testing.assert_close(ops.linear(x, *weight, None, spec), 2 * before)
    assert torch.equal(ops.unpack_codes(weight[0], spec).cpu(), random_codes(spec))
