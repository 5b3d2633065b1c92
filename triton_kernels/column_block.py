"""A block of columns, vector after vector, for a tile of rows per program: quantization with error propagation, and descent.

Rows do not depend on each other.  The corrections of the vectors done so far stay in registers, `done` [R, B]; a vector's own values
are brought up to date just before it is visited, by one product with the columns of the matrix that belong to it.
"""
import triton
import triton.language as tl

from .assign import nearest


@triton.jit
def _current(start, row, i, done, transposed, width, DIM: tl.constexpr, B: tl.constexpr):
    """Tuple of DIM tensors [R]: start [rows, width] at vector i, less done[:, :i] @ matrix[:i, i]; the matrix comes transposed."""
    j = tl.arange(0, B)
    values = ()
    for a in tl.static_range(DIM):
        col = i * DIM + a
        factor = tl.load(transposed + col * width + j, mask=j < i * DIM, other=0.0)
        values = values + (tl.load(start + row * width + col) - tl.sum(done * factor[None, :], axis=1),)
    return values


@triton.jit
def _codebook(centroids, own, strip, K, strips, DIM: tl.constexpr, GROUP_ROWS: tl.constexpr, R: tl.constexpr, SHARED: tl.constexpr):
    """Pointer to the codebook [K, DIM] of each row, or of all."""
    group = tl.program_id(0) * R // GROUP_ROWS if SHARED else own // GROUP_ROWS
    return centroids + (group.to(tl.int64) * strips + strip) * K * DIM


@triton.jit
def column_block_kernel(W, transposed, roots, metric, centroids, strip, scale, index, E, rows, n, strips, K, DIM: tl.constexpr,
                        GROUP_ROWS: tl.constexpr, SHARED: tl.constexpr, SCALED: tl.constexpr, STALE: tl.constexpr, R: tl.constexpr,
                        B: tl.constexpr, BLOCK_K: tl.constexpr):
    """See backends.reference.column_block; `transposed` is U^T, metric [n, DIM, DIM] = roots roots^T.  n DIM <= B."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    own = tl.minimum(row, rows - 1)
    at = own.to(tl.int64)
    position = tl.arange(0, B)[None, :]
    errors = tl.zeros((R, B), tl.float32)
    for i in range(n):
        codebook = _codebook(centroids, own, tl.load(strip + i), K, strips, DIM, GROUP_ROWS, R, SHARED)
        w = _current(W, at, i, errors, transposed, n * DIM, DIM, B)
        if SCALED:
            size = tl.load(scale + at * n + i)
        point = ()
        for a in tl.static_range(DIM):
            value = tl.load(W + at * (n * DIM) + i * DIM + a) if SCALED and STALE else w[a]
            point = point + (value / size if SCALED else value,)
        best = nearest(point, metric + i * DIM * DIM, codebook, K, DIM, BLOCK_K, SHARED)
        tl.store(index + row.to(tl.int64) * n + i, best.to(tl.uint8), mask=row < rows)
        gap = ()
        for a in tl.static_range(DIM):
            q = tl.load(codebook + best * DIM + a)
            gap = gap + (w[a] - (q * size if SCALED else q),)
        for a in tl.static_range(DIM):
            error = gap[0] * tl.load(roots + i * DIM * DIM + a)
            for b in tl.static_range(1, DIM):
                error += gap[b] * tl.load(roots + i * DIM * DIM + b * DIM + a)
            errors = tl.where(position == i * DIM + a, error[:, None], errors)
    tl.store(E + row.to(tl.int64)[:, None] * (n * DIM) + position, errors, mask=(row < rows)[:, None] & (position < n * DIM))


@triton.jit
def descent_block_kernel(residual, transposed, inverse, metric, centroids, strip, scale, index, change, rows, n, strips, K,
                         DIM: tl.constexpr, GROUP_ROWS: tl.constexpr, SHARED: tl.constexpr, SCALED: tl.constexpr, R: tl.constexpr,
                         B: tl.constexpr, BLOCK_K: tl.constexpr):
    """See backends.reference.descent_block; `transposed` is H^T, metric [n, DIM, DIM] the diagonal blocks of H.  index is updated."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    own = tl.minimum(row, rows - 1)
    at = own.to(tl.int64)
    position = tl.arange(0, B)[None, :]
    moved = tl.zeros((R, B), tl.float32)
    for i in range(n):
        codebook = _codebook(centroids, own, tl.load(strip + i), K, strips, DIM, GROUP_ROWS, R, SHARED)
        pull = _current(residual, at, i, moved, transposed, n * DIM, DIM, B)
        before = tl.load(index + at * n + i).to(tl.int32)
        if SCALED:
            size = tl.load(scale + at * n + i)
        old, point = (), ()
        for a in tl.static_range(DIM):
            q = tl.load(codebook + before * DIM + a)
            old = old + (q * size if SCALED else q,)
            target = old[a]
            for b in tl.static_range(DIM):
                target += pull[b] * tl.load(inverse + i * DIM * DIM + a * DIM + b)
            point = point + (target / size if SCALED else target,)
        best = nearest(point, metric + i * DIM * DIM, codebook, K, DIM, BLOCK_K, SHARED)
        tl.store(index + row.to(tl.int64) * n + i, best.to(tl.uint8), mask=row < rows)
        for a in tl.static_range(DIM):
            q = tl.load(codebook + best * DIM + a)
            step = (q * size if SCALED else q) - old[a]
            moved = tl.where(position == i * DIM + a, step[:, None], moved)
    tl.store(change + row.to(tl.int64)[:, None] * (n * DIM) + position, moved, mask=(row < rows)[:, None] & (position < n * DIM))
