"""The packed format: bytes worked out by hand from the layout's description, and its definition in plain loops."""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed_cases import (
    SHAPES,
    SPECS,
    dequantized,
    random_codes,
    random_tables,
    spec_id,
    specs,
)

from gptvq.backends import native, reference
from gptvq.spec import QuantSpec
from gptvq.weight import VQWeight, pack_scale_codes, unpack_scale_codes

BACKENDS = [pytest.param(reference, id="reference"), pytest.param(native, id="native")]
pytestmark = pytest.mark.skipif(not native.serves(torch.device("cpu")), reason=native.why_not(torch.device("cpu")))

# (dim, index_bits): (codes of the 32 columns of one row, its four bytes in each 64-byte plane).
HAND = {
    # One code per column; plane p holds columns 16 p.., bits 2 s + 1 : 2 s of byte j hold column 16 p + 4 s + j.
    (1, 2): ([0, 1, 2, 3, 3, 2, 1, 0, 1, 1, 1, 1, 2, 0, 2, 0] + [3, 0, 0, 0, 0, 3, 0, 0, 0, 0, 3, 0, 0, 0, 0, 3],
             ["9c 19 96 13", "03 0c 30 c0"]),
    # A[2:0] column j, A[5:3] 4+j; B 8+j, 12+j; C 16+j, 20+j; 24+j = A[7:6] | C[6] << 2; 28+j = B[7:6] | C[7] << 2.
    (1, 3): ([1, 2, 3, 4, 5, 6, 7, 0, 7, 6, 5, 4, 3, 2, 1, 0, 1, 3, 5, 7, 0, 2, 4, 6, 4, 1, 7, 2, 3, 4, 0, 7],
             ["29 72 fb 84", "df 16 0d c4", "41 93 65 b7"]),
    # Plane p holds columns 8 p..: low nibble of byte j column 8 p + j, high nibble 8 p + 4 + j.
    (1, 4): ([1, 2, 3, 4, 5, 6, 7, 8, 15, 0, 15, 0, 0, 15, 0, 15] + [9, 10, 11, 12, 13, 14, 15, 0] + [0, 0, 0, 1, 2, 0, 0, 0],
             ["51 62 73 84", "0f f0 0f f0", "d9 ea fb 0c", "20 00 00 01"]),
    # The same with a code per pair of columns.
    (2, 2): ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0], ["51 62 73 84", "d9 ea fb 0c"]),
    # A[5:0] pair j, B[5:0] 4+j, C[5:0] 8+j; pair 12+j = A[7:6] << 4 | B[7:6] << 2 | C[7:6]:
    # 52 = 11 01 00, 27 = 01 10 11, 1 = 00 00 01, 63 = 11 11 11.
    (2, 3): ([1, 2, 3, 63, 5, 6, 7, 8, 9, 10, 11, 12, 52, 27, 1, 63],
             ["c1 42 03 ff", "45 86 07 c8", "09 ca 4b cc"]),
    # One byte per pair; plane p holds pairs 4 p...
    (2, 4): (list(range(240, 256)), ["f0 f1 f2 f3", "f4 f5 f6 f7", "f8 f9 fa fb", "fc fd fe ff"]),
    # One byte per four columns.
    (4, 2): ([7, 77, 177, 255, 0, 1, 128, 129], ["07 4d b1 ff", "00 01 80 81"]),
    # The same, and bit v of byte i of the last plane negates column 4 v + i: signs 1, 8, 15, 0, 6, 1, 0, 10.
    (4, 3): ([7 + 0x100, 77 + 0x800, 177 + 0xf00, 255, 0x600, 1 + 0x100, 128, 129 + 0xa00],
             ["07 4d b1 ff", "00 01 80 81", "25 94 14 86"]),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", HAND, ids=lambda f: f"{f[0]}d{f[1]}b")
def test_bytes_by_hand(form, backend):
    """Row 19, columns 32..63 of a 33 x 70 weight: tile 1, block 1, bytes 12..15 of each plane; all else is code 0."""
    row_codes, planes = HAND[form]
    spec = QuantSpec(33, 70, *form, 16, 64)
    codes = torch.zeros(33, spec.vectors, dtype=getattr(torch, spec.code_dtype))
    codes[19, 32 // spec.dim : 64 // spec.dim] = torch.tensor(row_codes, dtype=codes.dtype)
    want = torch.zeros(3, 3, len(planes), 64, dtype=torch.uint8)
    for p, plane in enumerate(planes):
        want[1, 1, p, 12:16] = torch.tensor(list(bytes.fromhex(plane)), dtype=torch.uint8)
    packed = backend.pack_codes(codes, spec)
    assert torch.equal(packed, want.view(3, 3, -1))
    assert torch.equal(backend.unpack_codes(packed, spec), codes)


def test_scale_bytes_by_hand():
    """Three blocks in two rows, one of them in the second tile: low nibble the even block, high nibble the odd one."""
    spec = QuantSpec(18, 80, 2, 2, 16, 64, scale_block=32)
    codes = torch.zeros(18, 3, dtype=torch.uint8)
    codes[2] = torch.tensor([1, 2, 3])
    codes[17] = torch.tensor([15, 14, 13])
    packed = pack_scale_codes(codes, spec)
    assert packed.shape == (2, 2, 16) and packed.dtype == torch.uint8
    assert packed[0, :, 2].tolist() == [0x21, 0x03] and packed[1, :, 1].tolist() == [0xEF, 0x0D]
    assert packed.sum() == 0x21 + 0x03 + 0xEF + 0x0D
    assert torch.equal(unpack_scale_codes(packed, spec), codes)


@given(specs(), st.integers(0, 2**31))
def test_round_trip_and_equal_bytes(spec, seed):
    codes = random_codes(spec, seed)
    packed = native.pack_codes(codes, spec)
    assert packed.shape == (spec.tiles, spec.blocks, spec.block_bytes)
    assert torch.equal(packed, reference.pack_codes(codes, spec))
    assert torch.equal(native.unpack_codes(packed, spec), codes)
    assert torch.equal(reference.unpack_codes(packed, spec), codes)


@given(specs(), st.integers(0, 2**31))
def test_unpacking_arbitrary_bytes_gives_legal_codes(spec, seed):
    """A damaged file never leads to a look-up outside a codebook, and every bit of a full block belongs to one code."""
    shape = spec.tiles, spec.blocks, spec.block_bytes
    noise = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    codes = native.unpack_codes(noise, spec)
    assert 0 <= int(codes.min()) and int(codes.max()) < 1 << spec.code_bits and torch.equal(codes, reference.unpack_codes(noise, spec))
    if spec.rows % 16 == 0 and spec.cols % 32 == 0:
        assert torch.equal(native.pack_codes(codes, spec), noise)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_dequantize_is_its_definition(spec, backend):
    codes, tables = random_codes(spec), random_tables(spec)
    got = backend.dequantize(backend.pack_codes(codes, spec), *tables, spec, torch.float32)
    assert torch.equal(got, dequantized(spec, codes, *tables))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", HAND, ids=lambda f: f"{f[0]}d{f[1]}b")
def test_nbytes_is_what_the_spec_says(form, shape):
    rows, cols, group_rows, group_cols, scale = shape
    spec = QuantSpec(rows, cols, *form, group_rows, group_cols, scale)
    cb, gs, sc, _ = random_tables(spec)
    scales = {"scale_codes": unpack_scale_codes(sc, spec), "sz": torch.rand(spec.scale_blocks, 2)} if scale else {}
    weight = VQWeight.from_parts(spec, random_codes(spec), {"cb": cb}, gs, **scales)
    stored = sum(t.untyped_storage().nbytes() for t in weight.buffers.values())
    assert weight.nbytes == spec.nbytes == stored
    assert weight.bits_per_value == spec.bits_per_value == 8 * stored / (rows * cols)


def test_bits_per_value_by_hand():
    """1024 x 1024 at 2d-2.25 in groups of 4 x 256: 2 bits of index, 32 bytes of codebook and 2 of scale per 1024 weights."""
    assert QuantSpec(1024, 1024, 2, 2, 4, 256).bits_per_value == 2 + 8 * 34 / 1024
    scaled = QuantSpec(1024, 1024, 2, 2, 8, 256, scale_block=64)
    assert scaled.bits_per_value == 2 + 8 * 34 / 2048 + 4 / 64 + 16 * 4 * 8 / 1024**2
    assert QuantSpec(64, 64, 1, 3, 8, 64, svd_rank=2).nbytes == 64 * 64 * 3 // 8 + 8 * (2 + 2) + 2 * 8 * 2
