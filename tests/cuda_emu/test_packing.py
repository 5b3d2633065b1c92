"""pack, unpack, dequantize, decode and collect on a GPU against the reference, by way of gptvq.ops."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_cases import SPECS, random_codes, random_tables, spec_id, specs

from gptvq import ops
from gptvq.backends import cuda, reference
from gptvq.errors import ConfigError
from gptvq.spec import FORMATS, QuantSpec

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
ORDER = {spec: ("forward", "reverse", "round robin", "random")[i % 4] for i, spec in enumerate(SPECS)}


def same_bits(got, want):
    assert got.dtype == want.dtype and got.shape == want.shape
    assert torch.equal(got.cpu().view(BITS[got.dtype]), want.view(BITS[want.dtype]))


def on(device, tensors):
    return [None if t is None else t.to(device) for t in tensors]


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_packed_weights(machine, spec):
    codes, tables = random_codes(spec), random_tables(spec)
    packed = reference.pack_codes(codes, spec)
    for _ in machine.orders((ORDER[spec],)):
        assert torch.equal(ops.pack_codes(codes.to(machine.device), spec).cpu(), packed)
        assert torch.equal(ops.unpack_codes(packed.to(machine.device), spec).cpu(), codes)
        for dtype in DTYPES:
            got = ops.dequantize(*on(machine.device, (packed, *tables)), spec, dtype)
            same_bits(got, reference.dequantize(packed, *tables, spec, dtype))


@pytest.mark.parametrize("form", sorted(FORMATS), ids=lambda f: f"{f[0]}d{f[1]}b")
def test_every_order_of_threads(machine, form):
    spec = QuantSpec(35, 1100, *form, 24, 256, 32)            # three parts of columns, two of rows
    codes, tables = random_codes(spec), random_tables(spec)
    packed = reference.pack_codes(codes, spec)
    want = reference.dequantize(packed, *tables, spec, torch.float16)
    for _ in machine.orders():
        same_bits(ops.dequantize(*on(machine.device, (packed, *tables)), spec, torch.float16), want)


@pytest.mark.parametrize("spec", [QuantSpec(40, 300, 4, 2, 1, 4), QuantSpec(40, 300, 4, 3, 1, 16, 16), QuantSpec(16, 160, 2, 4, 3, 2)],
                         ids=spec_id)
def test_more_codebooks_than_fit_into_shared_memory(machine, spec):
    codes, tables = random_codes(spec), random_tables(spec)
    packed = reference.pack_codes(codes, spec)
    for _ in machine.orders(("reverse",)):
        got = ops.dequantize(*on(machine.device, (packed, *tables)), spec, torch.float32)
        same_bits(got, reference.dequantize(packed, *tables, spec, torch.float32))


@settings(max_examples=40)
@given(spec=specs(), seed=st.integers(0, 2**31), dtype=st.sampled_from(DTYPES))
def test_anywhere(machine, spec, seed, dtype):
    tables = random_tables(spec, seed)
    packed = torch.randint(0, 256, (spec.tiles, spec.blocks, spec.block_bytes), dtype=torch.uint8,      # also where no code lies
                           generator=torch.Generator().manual_seed(seed))
    for _ in machine.orders(("random",)):
        same_bits(ops.dequantize(*on(machine.device, (packed, *tables)), spec, dtype), reference.dequantize(packed, *tables, spec, dtype))
        assert torch.equal(ops.unpack_codes(packed.to(machine.device), spec).cpu(), reference.unpack_codes(packed, spec))


def test_codes_above_the_codebook_touch_no_other(machine):
    """ops.pack_codes refuses them; the kernel alone takes their low bits."""
    spec = QuantSpec(20, 40, 2, 3, 16, 32)
    codes = torch.randint(0, 256, (spec.rows, spec.vectors), dtype=torch.uint8)
    with pytest.raises(ConfigError, match="need values from 0 to 63"):
        ops.pack_codes(codes.to(machine.device), spec)
    assert torch.equal(cuda.pack_codes(codes.to(machine.device), spec).cpu(), reference.pack_codes(codes & 63, spec))
    spec = QuantSpec(20, 40, 4, 3, 16, 32)
    codes = torch.randint(-2**15, 2**15, (spec.rows, spec.vectors), dtype=torch.int16)
    assert torch.equal(cuda.pack_codes(codes.to(machine.device), spec).cpu(), reference.pack_codes(codes & 0xfff, spec))


def test_strided_and_shifted_tensors(machine):
    spec = QuantSpec(33, 70, 2, 3, 16, 32, scale_block=32)
    codes, tables = random_codes(spec), random_tables(spec)
    packed = reference.pack_codes(codes, spec)
    twice = [torch.stack([t, t.new_zeros(t.shape)], -1).to(machine.device)[..., 0] for t in (packed, *tables)]
    shifted = [torch.cat([t.flatten()[:1], t.flatten()]).to(machine.device)[1:].view(t.shape) for t in (packed, *tables)]
    for tensors in (twice, shifted):
        same_bits(ops.dequantize(*tensors, spec, torch.float32), reference.dequantize(packed, *tables, spec, torch.float32))
        assert torch.equal(ops.unpack_codes(tensors[0], spec).cpu(), codes)


@pytest.mark.parametrize("name, change, message", [
    (0, lambda t: t[:1], r"idx: got uint8 \(1, 3, 192\), need uint8 \(3, 3, 192\)"),
    (1, lambda t: t.float(), "cb: got float32"),
    (2, lambda t: t[:, :1], "gs: got bfloat16"),
    (3, lambda t: None, "sc: got None, need a tensor"),
    (4, lambda t: t.to("meta"), "got tensors on .* and meta, need all on one device"),
])
def test_wrong_tensor_is_named(machine, name, change, message):
    spec = QuantSpec(33, 70, 2, 3, 16, 32, scale_block=32)
    arguments = on(machine.device, (reference.pack_codes(random_codes(spec), spec), *random_tables(spec)))
    arguments[name] = change(arguments[name])
    with pytest.raises(ConfigError, match=message):
        ops.dequantize(*arguments, spec, torch.float32)


#: rows, vectors, row groups, strips, K, d, group_rows
LAYERS = [(8, 24, 2, 3, 16, 2, 4), (37, 33, 5, 4, 4, 1, 8), (20, 50, 1, 1, 256, 4, 64), (1, 1, 1, 1, 16, 2, 16), (13, 70, 13, 2, 64, 2, 1),
          (70, 40, 2, 40, 8, 1, 35)]


def codes_of(rows, n, groups, strips, k, d, group_rows, seed=0):
    """index, centroids, strip (in no order), scale of a layer that is being solved."""
    g = torch.Generator().manual_seed(seed)
    index = torch.randint(0, k, (rows, n), dtype=torch.uint8, generator=g)
    strip = torch.randint(0, strips, (n,), generator=g)
    return index, torch.randn(groups, strips, k, d, generator=g), strip, torch.rand(rows, n, generator=g) + 0.5


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_decode(machine, layer):
    index, centroids, strip, scale = codes_of(*layer)
    for given_scale in (None, scale):
        want = reference.decode(index, centroids, strip, given_scale, layer[-1])
        for _ in machine.orders(("reverse", "random")):
            same_bits(ops.decode(*on(machine.device, (index, centroids, strip, given_scale)), layer[-1]), want)


@pytest.mark.parametrize("f", [1, 2, 4, 3, 16])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_collect(machine, layer, f):
    index, _, strip, _ = codes_of(*layer)
    rows, n, groups, strips, k, _, group_rows = layer
    values = torch.randn(rows, n, f, generator=torch.Generator().manual_seed(1))
    want = reference.collect(index, values, strip, group_rows, (groups, strips, k))
    results = set()
    for _ in machine.orders():
        got = ops.collect(*on(machine.device, (index, values, strip)), group_rows, (groups, strips, k)).cpu()
        assert torch.allclose(got, want, rtol=1e-12, atol=1e-13 * n)
        results.add(got.numpy().tobytes())
    assert len(results) == 1                                  # not one bit depends on who comes first


def test_decode_and_collect_of_codes_with_signs(machine):
    rows, n, groups, strips, k, d, group_rows = layer = 37, 21, 2, 3, 256, 4, 24
    _, centroids, strip, scale = codes_of(*layer)
    index = torch.randint(0, 4096, (rows, n), dtype=torch.int16)
    for given_scale in (None, scale):
        for _ in machine.orders(("random",)):
            got = ops.decode(*on(machine.device, (index, centroids, strip, given_scale)), group_rows)
            same_bits(got, reference.decode(index, centroids, strip, given_scale, group_rows))
    for f in (4, 16):
        values = torch.randn(rows, n, f)
        want = reference.collect(index, values, strip, group_rows, (groups, strips, k))
        for _ in machine.orders():
            got = ops.collect(*on(machine.device, (index, values, strip)), group_rows, (groups, strips, k)).cpu()
            assert torch.allclose(got, want, rtol=1e-12, atol=1e-12)
    for change in ({"centroids": centroids[:, :, :16]}, {"centroids": centroids[..., :2]}):
        with pytest.raises(ConfigError, match="decode: centroids: got .* need .* where codes have signs"):
            cuda.decode(*on(machine.device, (index, change["centroids"].contiguous(), strip, None)), group_rows)
    with pytest.raises(ConfigError, match="collect: sums: got .* need 4 or 16 where codes have signs"):
        cuda.collect(*on(machine.device, (index, torch.randn(rows, n, 2), strip)), group_rows, (groups, strips, k))


def test_collect_of_changed_strips_and_without_versions(machine):
    """What is remembered of `strip` is forgotten when it changes; inference tensors do not count their changes."""
    layer = LAYERS[1]
    index, _, strip, _ = codes_of(*layer)
    values, shape = torch.randn(layer[0], layer[1], 2), (layer[2], layer[3], layer[4])
    place = on(machine.device, (index, values, strip.clone()))
    for _ in range(2):
        got = ops.collect(*place, layer[-1], shape).cpu()
        assert torch.allclose(got, reference.collect(index, values, place[2].cpu(), layer[-1], shape))
        place[2].copy_(strip.flip(0))
    with torch.inference_mode():
        got = ops.collect(*on(machine.device, (index, values)), strip.to(machine.device) + 0, layer[-1], shape).cpu()
    assert torch.allclose(got, reference.collect(index, values, strip, layer[-1], shape))


def test_collect_where_sums_do_not_fit(machine):
    """More numbers per centroid than the kernel has shared memory for are summed by the reference."""
    index, _, strip, _ = codes_of(*LAYERS[2])
    values = torch.randn(20, 50, 60)
    got = ops.collect(*on(machine.device, (index, values, strip)), 64, (1, 1, 256))
    assert torch.allclose(got.cpu(), reference.collect(index, values, strip, 64, (1, 1, 256)))


def test_numbers_out_of_range_stay_inside(machine):
    """Damaged indices and strips give wrong values, not wrong addresses."""
    index, centroids, strip, _ = codes_of(*LAYERS[0])
    index[:] = 255
    strip[::2], strip[1::2] = 1 << 40, -5
    got = ops.decode(*on(machine.device, (index, centroids, strip, None)), 4).cpu()
    group = torch.arange(8)[:, None] // 4
    edge = torch.where(torch.arange(24) % 2 == 0, 2, 0)
    assert torch.equal(got, centroids[group, edge, 15].reshape(8, -1))
    sums = ops.collect(*on(machine.device, (index, torch.ones(8, 24, 2), strip)), 4, (2, 3, 16)).cpu()
    assert sums.isfinite().all()


def test_products(machine):
    """gram counts above the diagonal only; 16-bit inputs are summed in float32."""
    g = torch.Generator().manual_seed(2)
    for dtype in DTYPES:
        a, b = torch.randn(40, 1100, generator=g).to(dtype), torch.randn(40, 70, generator=g).to(dtype)
        total = torch.randn(1100, 1100, generator=g)
        got, want = total.clone().to(machine.device), total.double() + a.double().T @ a.double()
        ops.gram(got, a.to(machine.device))
        assert torch.allclose(got.cpu().triu().double(), want.triu(), rtol=1e-5, atol=1e-4)
        got = torch.zeros(1100, 70, device=machine.device)
        ops.cross(got, a.to(machine.device), b.to(machine.device))
        assert torch.allclose(got.cpu().double(), a.double().T @ b.double(), rtol=1e-5, atol=1e-4)
    A, B, C = torch.randn(30, 20, generator=g), torch.randn(20, 9, generator=g), torch.randn(30, 9, generator=g)
    assert torch.allclose(ops.matmul(*on(machine.device, (A, B))).cpu(), A @ B, atol=1e-5)
    changed = C.clone().to(machine.device)
    ops.submatmul(changed, *on(machine.device, (A, B)))
    assert torch.allclose(changed.cpu(), C - A @ B, atol=1e-5)


def test_products_ignore_what_the_caller_allows_for_the_model(machine):
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    try:
        products.fp32_precision = "tf32"
        A, B = torch.randn(64, 512, dtype=torch.float32), torch.randn(512, 64)
        got = ops.matmul(*on(machine.device, (A, B))).cpu()
        assert products.fp32_precision == "tf32"
        assert (got.double() - A.double() @ B.double()).abs().max() < 1e-4
    finally:
        products.fp32_precision = before
