"""Packed weights to dense ones, and the float form of decoding that the solver uses."""
import triton
import triton.language as tl

from .packed import weight_tile


@triton.jit
def dequantize_kernel(idx, cb, gs, sc, table, out, rows, cols, units, strips, pairs, BITS: tl.constexpr, DIM: tl.constexpr,
                      V: tl.constexpr, WORDS: tl.constexpr, GROUP_ROWS: tl.constexpr, GROUP_COLS: tl.constexpr,
                      SCALE_BLOCK: tl.constexpr, R: tl.constexpr, N: tl.constexpr):
    """out [rows, cols] of any float type; a program writes R rows of N vectors."""
    row = (tl.program_id(0) * R + tl.arange(0, R))[:, None]
    n = tl.program_id(1) * N + tl.arange(0, N)
    tile = weight_tile(idx, cb, gs, sc, table, row, n[None, :], rows, cols, units, strips, pairs, BITS, DIM, V, WORDS, GROUP_ROWS,
                       GROUP_COLS, SCALE_BLOCK, R, N)
    col = (tl.program_id(1) * N * DIM + tl.arange(0, N * DIM))[None, :]
    tl.store(out + row.to(tl.int64) * cols + col, tile.to(out.dtype.element_ty), mask=(row < rows) & (col < cols))


@triton.jit
def decode_kernel(index, centroids, strip, scale, out, rows, n, strips, K, DIM: tl.constexpr, GROUP_ROWS: tl.constexpr,
                  SCALED: tl.constexpr, R: tl.constexpr, N: tl.constexpr):
    """out [rows, n DIM] = centroids [row groups, strips, K, DIM] at index [rows, n], strip [n], times scale [rows, n]."""
    row = (tl.program_id(0) * R + tl.arange(0, R))[:, None]
    v = (tl.program_id(1) * N + tl.arange(0, N))[None, :]
    inside = (row < rows) & (v < n)
    at = row.to(tl.int64) * n + v
    group = row // GROUP_ROWS * strips + tl.load(strip + v, mask=v < n, other=0).to(tl.int32)
    code = tl.load(index + at, mask=inside, other=0).to(tl.int32)
    for i in tl.static_range(DIM):
        value = tl.load(centroids + (group.to(tl.int64) * K + code) * DIM + i, mask=inside, other=0.0)
        if SCALED:
            value = value * tl.load(scale + at, mask=inside, other=0.0)
        tl.store(out + at * DIM + i, value, mask=inside)
