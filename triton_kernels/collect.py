"""Sums per centroid, always added in the same order."""
import triton
import triton.language as tl


@triton.jit
def sum_by_code(code, values, BLOCK_K: tl.constexpr):
    """values float32 [N, F] summed over points of equal code [N] -> float64 [BLOCK_K, F]; no sum for codes below 0."""
    member = (tl.arange(0, BLOCK_K)[:, None] == code[None, :]).to(tl.float32)
    return tl.dot(member, values, input_precision="tf32x3").to(tl.float64)


@triton.jit
def collect_kernel(index, values, strip, begin, end, out, rows, n, strips, K, F, GROUP_ROWS: tl.constexpr, BN: tl.constexpr,
                   BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr):
    """out f64 [row groups, strips, K, F]: values f32 [rows, n, F] by index u8 [rows, n]; a program sums for one codebook.

    The vectors v with strip[v] = s lie in [begin[s], end[s]); others in between are left out.
    """
    group, s = tl.program_id(0), tl.program_id(1)
    first = tl.load(begin + s)
    width = tl.maximum(tl.load(end + s) - first, 1)
    k, f = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_F)
    total = tl.zeros((BLOCK_K, BLOCK_F), tl.float64)
    for start in range(0, GROUP_ROWS * width, BN):
        point = start + tl.arange(0, BN)
        row, v = group * GROUP_ROWS + point // width, first + point % width
        inside = (point < GROUP_ROWS * width) & (row < rows) & (v < n)
        inside = inside & (tl.load(strip + v, mask=inside, other=-1) == s)
        at = row.to(tl.int64) * n + v
        code = tl.load(index + at, mask=inside, other=0).to(tl.int32)
        value = tl.load(values + at[:, None] * F + f[None, :], mask=inside[:, None] & (f < F)[None, :], other=0.0)
        total += sum_by_code(tl.where(inside, code, -1), value, BLOCK_K)
    to = out + ((group.to(tl.int64) * strips + s) * K + k[:, None]) * F + f[None, :]
    tl.store(to, total, mask=(k < K)[:, None] & (f < F)[None, :])
