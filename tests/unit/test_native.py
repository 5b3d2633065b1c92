"""gptvq._C against the reference backend, bit for bit, and its refusal of arguments that do not fit."""
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed_cases import SPECS, random_codes, random_tables, spec_id, specs

from gptvq import ops
from gptvq.backends import native, reference
from gptvq.errors import ConfigError
from gptvq.spec import FORMATS, QuantSpec
from gptvq.weight import VQWeight

_C = pytest.importorskip("gptvq._C", reason="gptvq is not built")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def assert_same_bits(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape
    assert torch.equal(a.view(BITS[a.dtype]), b.view(BITS[b.dtype]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_dequantize_equals_reference(spec, dtype):
    packed, tables = reference.pack_codes(random_codes(spec), spec), random_tables(spec)
    assert_same_bits(native.dequantize(packed, *tables, spec, dtype), reference.dequantize(packed, *tables, spec, dtype))


@given(specs(), st.integers(0, 2**31), st.sampled_from(DTYPES))
def test_dequantize_equals_reference_anywhere(spec, seed, dtype):
    packed, tables = reference.pack_codes(random_codes(spec, seed), spec), random_tables(spec, seed)
    assert_same_bits(native.dequantize(packed, *tables, spec, dtype), reference.dequantize(packed, *tables, spec, dtype))


@pytest.mark.parametrize("form", sorted(FORMATS), ids=lambda f: f"{f[0]}d{f[1]}b")
@pytest.mark.parametrize("scale_block", [0, 64])
def test_threads_do_not_change_the_result(form, scale_block):
    spec = QuantSpec(1003, 520, *form, 24, 256, scale_block)      # large enough for threads
    packed, tables = reference.pack_codes(random_codes(spec), spec), random_tables(spec)
    want = reference.dequantize(packed, *tables, spec, torch.float16)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            assert_same_bits(native.dequantize(packed, *tables, spec, torch.float16), want)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_over_the_whole_range(dtype):
    """With centroid and group scale 1 the output is the scale table, rounded: all exponents, ties, subnormals, infinity."""
    spec = QuantSpec(16, 65536, 1, 4, 16, 65536, scale_block=16)
    g = torch.Generator().manual_seed(3)
    bits = torch.randint(-2**31, 2**31 - 1, (spec.scale_blocks, 16), generator=g).to(torch.int32)
    bits[:1000] &= ~0xFFF                            # many ties for float16
    bits[1000:2000] &= ~0x7FFF                       # and for bfloat16
    bits[2000:3000] = (bits[2000:3000] & ~0x7F800000) | torch.randint(96, 115, (1000, 16), generator=g).to(torch.int32) << 23
    table = bits.view(torch.float32).clone()
    table[table.isnan()] = torch.inf
    code = torch.arange(16, dtype=torch.uint8)
    sc = (code | code << 4).expand(1, spec.scale_blocks // 2, 16).contiguous()
    ones = torch.ones(1, 1, 1, 16, dtype=torch.int8), torch.ones(1, 1, dtype=torch.bfloat16)
    idx = torch.zeros(spec.tiles, spec.blocks, spec.block_bytes, dtype=torch.uint8)
    got = native.dequantize(idx, *ones, sc, table, spec, dtype)
    assert_same_bits(got[:, ::16], table.T.to(dtype))


def test_nan_stays_nan():
    spec = QuantSpec(4, 8, 2, 2, 4, 8)
    cb, gs, _, _ = random_tables(spec)
    idx = native.pack_codes(random_codes(spec), spec)
    for dtype in DTYPES:
        assert native.dequantize(idx, cb.fill_(1), gs.fill_(torch.nan), None, None, spec, dtype).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_svd_codebook_through_vqweight(dtype, monkeypatch):
    spec = QuantSpec(40, 70, 1, 3, 8, 32, svd_rank=3)
    tables = {"cb_u": torch.randint(-127, 128, (spec.row_groups, spec.strips, 3), dtype=torch.int8),
              "cb_v": torch.randn(3, 8).half()}
    weight = VQWeight.from_parts(spec, random_codes(spec), tables, torch.rand(spec.row_groups, spec.strips))
    monkeypatch.setenv("GPTVQ_BACKEND", "native")
    got = weight.dequantize(dtype)
    monkeypatch.setenv("GPTVQ_BACKEND", "reference")
    assert_same_bits(got, weight.dequantize(dtype))
    assert got.unique().numel() > 8


def test_strided_arguments():
    spec = QuantSpec(33, 70, 2, 3, 16, 32, scale_block=32)
    codes, (cb, gs, sc, table) = random_codes(spec), random_tables(spec)
    packed = reference.pack_codes(codes, spec)
    want = reference.dequantize(packed, cb, gs, sc, table, spec, torch.float32)
    twice = [torch.stack([t, t.new_zeros(t.shape)], -1)[..., 0] for t in (packed, cb, gs, sc, table)]
    assert not any(t.is_contiguous() for t in twice)
    assert torch.equal(native.dequantize(*twice, spec, torch.float32), want)
    assert torch.equal(native.pack_codes(codes.T.contiguous().T, spec), packed)
    assert torch.equal(native.unpack_codes(twice[0], spec), codes)


def good_arguments():
    spec = QuantSpec(20, 40, 2, 2, 16, 32, scale_block=32)
    return dict(zip(("idx", "cb", "gs", "sc", "table"), (native.pack_codes(random_codes(spec), spec), *random_tables(spec)))), spec


@pytest.mark.parametrize("name, change, message", [
    ("idx", lambda t: t[:1], r"idx: got uint8 \(1, 2, 128\), need uint8 \(2, 2, 128\)"),
    ("idx", lambda t: t.to(torch.int8), r"idx: got int8 \(2, 2, 128\), need uint8"),
    ("idx", lambda t: t.reshape(-1), r"idx: got uint8 \(512,\), need"),
    ("cb", lambda t: t[..., :8], r"cb: got int8 \(2, 2, 2, 8\), need int8 \(2, 2, 2, 16\)"),
    ("cb", lambda t: t.float(), "cb: got float32"),
    ("gs", lambda t: t.half(), "gs: got float16"),
    ("gs", lambda t: t[:, :1], r"gs: got bfloat16 \(2, 1\)"),
    ("sc", lambda t: t[:, :0], r"sc: got uint8 \(2, 0, 16\)"),
    ("sc", lambda t: None, "sc: got None, need a tensor"),
    ("table", lambda t: None, "scale table: got None, need a tensor"),
    ("table", lambda t: t.double(), "scale table: got float64"),
    ("table", lambda t: t.to("meta"), "on meta"),
])
def test_wrong_tensor_is_named(name, change, message):
    arguments, spec = good_arguments()
    native.dequantize(*arguments.values(), spec, torch.float32)
    arguments[name] = change(arguments[name])
    with pytest.raises(ConfigError, match=message):
        native.dequantize(*arguments.values(), spec, torch.float32)


def raw(tensor, **change):
    fields = {"address": tensor.data_ptr(), "dtype": str(tensor.dtype)[6:], "shape": tuple(tensor.shape), "strides": tensor.stride()}
    return tuple({**fields, **change}.values())


def test_module_checks_what_python_should_have_checked():
    spec = QuantSpec(20, 40, 2, 2, 16, 32)
    codes, idx = random_codes(spec), torch.empty(spec.tiles, spec.blocks, spec.block_bytes, dtype=torch.uint8)
    fields = (20, 40, 2, 2, 16, 32, 0)
    _C.pack_codes(raw(codes), raw(idx), fields)
    with pytest.raises(ValueError, match="codes: got strides .* need a contiguous tensor"):
        _C.pack_codes(raw(codes, strides=(1, 20)), raw(idx), fields)
    with pytest.raises(ValueError, match="codes: got strides"):
        _C.pack_codes(raw(codes, strides=(1,)), raw(idx), fields)
    with pytest.raises(ValueError, match="codes: got a tensor without storage"):
        _C.pack_codes(raw(codes, address=0), raw(idx), fields)
    with pytest.raises(TypeError):
        _C.pack_codes(codes, idx, fields)
    with pytest.raises(TypeError):
        _C.pack_codes(raw(codes), raw(idx), fields[:-1])
    for position, bad, message in [(0, 0, "spec.rows: got 0"), (1, -5, "spec.cols: got -5"), (1, 2**40, "spec.cols"), (2, 3, "spec.dim"),
                                   (3, 5, "spec.index_bits"), (4, 0, "spec.group_rows"), (5, 33, "spec.group_cols"), (6, 8, "spec.scale_block"),
                                   (6, 64, "spec.group_cols: got 32, need a multiple of scale_block")]:
        with pytest.raises(ValueError, match=message):
            _C.pack_codes(raw(codes), raw(idx), (*fields[:position], bad, *fields[position + 1 :]))


def test_code_beyond_the_codebook_is_refused():
    spec = QuantSpec(5, 8, 2, 3, 4, 8)
    codes = random_codes(spec)
    codes[4, 3] = 64
    with pytest.raises(ConfigError, match="codes: got 64, need values below 64"):
        native.pack_codes(codes, spec)
    with pytest.raises(ConfigError, match="codes: got 64, need values from 0 to 63"):
        ops.pack_codes(codes, spec)


def test_unexpected_scales_are_refused():
    arguments, spec = good_arguments()
    plain = QuantSpec(20, 40, 2, 2, 16, 32)
    with pytest.raises(ConfigError, match="need None because the spec has no block scales"):
        native.dequantize(*arguments.values(), plain, torch.float32)


def test_concurrent_calls():
    """The interpreter lock is released during a call: calls from many threads must not disturb each other."""
    spec = QuantSpec(600, 640, 2, 3, 32, 128, scale_block=64)
    jobs = [(reference.pack_codes(random_codes(spec, i), spec), *random_tables(spec, i)) for i in range(4)]
    want = [reference.dequantize(*job, spec, torch.bfloat16) for job in jobs]
    got = [[] for _ in jobs]
    threads = [threading.Thread(target=lambda i=i: got[i].extend(native.dequantize(*jobs[i], spec, torch.bfloat16) for _ in range(10)))
               for i in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    for results, expected in zip(got, want):
        assert len(results) == 10 and all(torch.equal(r, expected) for r in results)


def test_cuda_info():
    info = _C.cuda_info()
    assert set(info) == {"available", "device_count", "runtime", "driver", "why"}
    assert info["available"] == (info["device_count"] > 0) == (info["why"] == "")
    assert _C.built_with_cuda or "without CUDA" in info["why"]
