"""Weighted nearest centroid in the exact d x d metric."""
import triton
import triton.language as tl


@triton.jit
def nearest(x, metric, codebook, K, DIM: tl.constexpr, BLOCK_K: tl.constexpr, SHARED: tl.constexpr):
    """Index [R] of the centroid c of least (x - c)^T M (x - c), the first of equals; x a tuple of DIM tensors [R].

    metric: pointer to M [DIM, DIM]; codebook: pointer to [K, DIM] for all rows (SHARED), else one for each, [R].
    """
    k = tl.arange(0, BLOCK_K)[None, :]
    if SHARED:
        entry = codebook + k * DIM
    else:
        entry = codebook[:, None] + k * DIM
    c = ()
    for a in tl.static_range(DIM):
        c = c + (tl.load(entry + a, mask=k < K, other=0.0),)
    for a in tl.static_range(DIM):
        for b in tl.static_range(DIM):
            m = tl.load(metric + b * DIM + a)
            term = c[b] * m - (2 * m * x[b])[:, None]
            pull = term if b == 0 else pull + term          # row a of M c - 2 M x
        score = c[a] * pull if a == 0 else score + c[a] * pull
    return tl.argmin(tl.where(k < K, score, float("inf")), axis=1)


@triton.jit
def assign_kernel(x, metric, centroids, index, rows, K, DIM: tl.constexpr, GROUP_ROWS: tl.constexpr, SHARED: tl.constexpr,
                  R: tl.constexpr, BLOCK_K: tl.constexpr):
    """x [rows, DIM], metric [DIM, DIM], centroids [row groups, K, DIM] -> index u8 [rows]."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    own = tl.minimum(row, rows - 1)
    point = ()
    for a in tl.static_range(DIM):
        point = point + (tl.load(x + own * DIM + a),)
    group = tl.program_id(0) * R // GROUP_ROWS if SHARED else own // GROUP_ROWS
    best = nearest(point, metric, centroids + group * K * DIM, K, DIM, BLOCK_K, SHARED)
    tl.store(index + row, best.to(tl.uint8), mask=row < rows)
