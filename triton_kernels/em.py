"""Weighted k-means of many groups from many seeds: a program takes one codebook through all its iterations.

A point enters as F = DIM + DIM (DIM + 1) / 2 features, linear in which its distance to any centroid is, and a constant; see
quadratic_features in gptvq/backends/reference.py.  E-step: a thread holds points and walks the centroids.  M-step: sums over points
are products with the 0/1 matrix of the assignment, tile after tile, and float64 across tiles.  No atomics: the same bytes each time.
"""
import triton
import triton.language as tl

from .collect import sum_by_code


@triton.jit
def quadratic_features_kernel(x, metric, weight, out, N, metrics, DIM: tl.constexpr, F: tl.constexpr, BN: tl.constexpr):
    """x [G, N, DIM], metric [metrics, DIM, DIM], weight [G, N] -> out [G, F + 1, N]: the features, then x^T M x."""
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    inside, at = n < N, tl.program_id(0).to(tl.int64) * N + n
    to = out + tl.program_id(0).to(tl.int64) * (F + 1) * N + n
    w = tl.load(weight + at, mask=inside, other=0.0)
    point = ()
    for a in tl.static_range(DIM):
        point = point + (tl.load(x + at * DIM + a, mask=inside, other=0.0),)
    spread = tl.zeros((BN,), tl.float32)
    for a in tl.static_range(DIM):
        pull = tl.zeros((BN,), tl.float32)
        for b in tl.static_range(DIM):
            m = w * tl.load(metric + (n % metrics) * (DIM * DIM) + a * DIM + b)
            pull += m * point[b]
            if b >= a:
                tl.store(to + (DIM + a * DIM - a * (a - 1) // 2 + b - a) * N, m if a == b else 2 * m, mask=inside)
        tl.store(to + a * N, -2 * pull, mask=inside)
        spread += pull * point[a]
    tl.store(to + F * N, spread, mask=inside)


@triton.jit
def _e_step(features, centroids, index, distance, first, N, K, DIM: tl.constexpr, F: tl.constexpr, BN: tl.constexpr):
    """Assigns BN points; returns (how many indices changed, the sum of the distances)."""
    n = first + tl.arange(0, BN)
    inside = n < N
    phi = ()
    for f in tl.static_range(F + 1):
        phi = phi + (tl.load(features + f * N + n, mask=inside, other=0.0),)
    best = tl.full((BN,), float("inf"), tl.float32)
    at = tl.zeros((BN,), tl.int32)
    for k in range(K):
        c = ()
        for a in tl.static_range(DIM):
            c = c + (tl.load(centroids + k * DIM + a),)
        for a in tl.static_range(DIM):
            pull = phi[a]
            for b in tl.static_range(a, DIM):
                pull += phi[DIM + a * DIM - a * (a - 1) // 2 + b - a] * c[b]
            score = pull * c[a] if a == 0 else score + pull * c[a]
        at = tl.where(score < best, k, at)              # of equals the first stays
        best = tl.minimum(score, best)
    before = tl.load(index + n, mask=inside, other=0).to(tl.int32)
    tl.store(index + n, at.to(tl.int16), mask=inside)
    apart = phi[F] + best
    tl.store(distance + n, apart, mask=inside)
    return tl.sum((inside & (at != before)).to(tl.int32)), tl.sum(tl.where(inside, apart, 0.0).to(tl.float64))


@triton.jit
def _m_step(features, x, centroids, index, distance, sums, N, K, DIM: tl.constexpr, F: tl.constexpr, BN: tl.constexpr,
            BM: tl.constexpr, BC: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr):
    """centroid = (sum M)^-1 sum M x in float64; one without weight moves to the point farthest from its own centroid."""
    k, f = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_F)
    total = tl.zeros((BLOCK_K, BLOCK_F), tl.float64)
    for first in range(0, N, BM):
        n = first + tl.arange(0, BM)
        phi = tl.load(features + f[None, :] * N + n[:, None], mask=(f < F)[None, :] & (n < N)[:, None], other=0.0)
        total += sum_by_code(tl.load(index + n, mask=n < N, other=-1).to(tl.int32), phi, BLOCK_K)
    tl.store(sums + k[:, None] * BLOCK_F + f[None, :], total)
    tl.debug_barrier()
    # Gauss-Jordan on [K, DIM, 2 DIM]: the sums of M, then in column DIM those of M x.  It is positive definite: no pivoting.
    row, col, column = tl.arange(0, DIM)[None, :, None], tl.arange(0, 2 * DIM)[None, None, :], tl.arange(0, 2 * DIM)[None, :]
    low, high = tl.minimum(row, col), tl.maximum(row, col)
    entry = tl.where(col < DIM, DIM + low * DIM - low * (low - 1) // 2 + high - low, row)
    factor = tl.where(col == DIM, -0.5, tl.where(row == col, 1.0, 0.5)).to(tl.float64)
    empty = 0
    for first in range(0, K, BC):
        c = first + tl.arange(0, BC)
        A = tl.load(sums + c[:, None, None] * BLOCK_F + entry, mask=(c < K)[:, None, None] & (col <= DIM), other=0.0) * factor
        filled = tl.sum(tl.sum(tl.where(row == col, A, 0.0), axis=2), axis=1) > 0
        empty += tl.sum((filled == 0).to(tl.int32) * (c < K).to(tl.int32))
        for p in tl.static_range(DIM):
            pivot = tl.sum(tl.where(row == p, A, 0.0), axis=1)
            pivot = pivot / tl.where(filled, tl.sum(tl.where(column == p, pivot, 0.0), axis=1), 1.0)[:, None]
            below = tl.sum(tl.where(col == p, A, 0.0), axis=2)
            A = tl.where(row == p, pivot[:, None, :], A - below[:, :, None] * pivot[:, None, :])
        mean = tl.sum(tl.where(col == DIM, A, 0.0), axis=2).to(tl.float32)
        tl.store(centroids + c[:, None] * DIM + tl.arange(0, DIM)[None, :], mean, mask=((c < K) & filled)[:, None])
    if empty > 0:
        last, last_at = float("inf"), -1                # the farthest point that has become a centroid
        for j in range(K):
            trace = tl.load(sums + j * BLOCK_F + DIM)
            for a in tl.static_range(1, DIM):
                trace += tl.load(sums + j * BLOCK_F + DIM + a * DIM - a * (a - 1) // 2)
            if trace <= 0:
                far, far_at = float("-inf"), 0
                for first in range(0, N, BN):
                    n = first + tl.arange(0, BN)
                    d = tl.load(distance + n, mask=n < N, other=float("-inf"))
                    d = tl.where((d < last) | (d == last) & (n > last_at), d, float("-inf"))
                    top = tl.max(d, axis=0)
                    far_at = tl.where(top > far, tl.min(tl.where(d == top, n, N), axis=0), far_at)
                    far = tl.maximum(far, top)
                if far > 0:
                    entry_of = tl.arange(0, DIM)
                    tl.store(centroids + j * DIM + entry_of, tl.load(x + far_at * DIM + entry_of))
                last, last_at = far, far_at


@triton.jit
def em_kernel(features, x, centroids, index, distance, sums, loss, N, groups, iterations, K, DIM: tl.constexpr, F: tl.constexpr,
              BN: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr):
    """Moves centroids [P, K, DIM] in place by up to `iterations` steps, problem p on group p % groups; stops when no index changes.

    features [groups, F + 1, N], x [groups, N, DIM]; index i16 [P, N], all -1 at first; distance f32 [P, N]; sums f64
    [P, BLOCK_K, BLOCK_F]; loss f64 [P]: the sum of distances at the last assignment.
    """
    p = tl.program_id(0).to(tl.int64)
    features += p % groups * (F + 1) * N
    x += p % groups * N * DIM
    centroids += p * K * DIM
    index += p * N
    distance += p * N
    sums += p * BLOCK_K * BLOCK_F
    step = 0
    while step < iterations:
        changed = 0
        total = tl.zeros((1,), tl.float64)
        for first in range(0, N, BN):
            moved, part = _e_step(features, centroids, index, distance, first, N, K, DIM, F, BN)
            changed += moved
            total += part
        tl.store(loss + p + tl.arange(0, 1), total)
        tl.debug_barrier()                              # all threads see all indices
        step += 1
        if changed > 0:
            _m_step(features, x, centroids, index, distance, sums, N, K, DIM, F, BN, BM, BC, BLOCK_K, BLOCK_F)
            tl.debug_barrier()
        else:
            step = iterations
