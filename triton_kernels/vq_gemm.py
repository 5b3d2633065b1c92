"""y = W x + b for some tens of tokens: weights are decoded in registers and multiplied on the tensor cores."""
import triton
import triton.language as tl

from .packed import weight_tile


@triton.jit
def vq_gemm_kernel(x, idx, cb, gs, sc, table, bias, y, tokens, rows, cols, units, strips, pairs, BITS: tl.constexpr,
                   DIM: tl.constexpr, V: tl.constexpr, WORDS: tl.constexpr, GROUP_ROWS: tl.constexpr, GROUP_COLS: tl.constexpr,
                   SCALE_BLOCK: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, R: tl.constexpr, M: tl.constexpr,
                   COLS: tl.constexpr):
    """x [tokens, cols], bias float32 [rows] or None, y [tokens, rows] like x; a program computes y^T for R rows and M tokens.

    OPERAND: the type in which weights and activations are multiplied; sums are float32.
    """
    N: tl.constexpr = COLS // DIM
    row = (tl.program_id(0) * R + tl.arange(0, R))[:, None]
    token = (tl.program_id(1) * M + tl.arange(0, M))[None, :]
    total = tl.zeros((R, M), tl.float32)
    for first in range(0, cols, COLS):
        n = (first // DIM + tl.arange(0, N))[None, :]
        weight = weight_tile(idx, cb, gs, sc, table, row, n, rows, cols, units, strips, pairs, BITS, DIM, V, WORDS, GROUP_ROWS,
                             GROUP_COLS, SCALE_BLOCK, R, N)
        col = (first + tl.arange(0, COLS))[:, None]
        value = tl.load(x + token * cols + col, mask=(token < tokens) & (col < cols), other=0.0)
        total = tl.dot(weight.to(OPERAND), value.to(OPERAND), total, input_precision=PRECISION)
    if bias is not None:
        total += tl.load(bias + row, mask=row < rows, other=0.0)
    tl.store(y + token * rows + row, total.to(y.dtype.element_ty), mask=(token < tokens) & (row < rows))
