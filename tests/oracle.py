"""The formulas of the method in float64 NumPy with plain loops: slow, obvious, and sharing no code with the package.

W [rows, n] weights, H [n, n] Hessian, n = vectors * d; `tables[r][v]` is the [K, d] codebook and `scale[r][v]` the block
scale of vector v of row r; an index is [rows, vectors].
"""
import math

import numpy as np


def loss(W, Q, H):
    """tr((W - Q) H (W - Q)^T)."""
    return sum((w - q) @ H @ (w - q) for w, q in zip(W, Q))


def damped(H, damp):
    return H + damp * np.mean(np.diag(H)) * np.eye(len(H))


def factor(A):
    """Upper U with U^T U = A^-1."""
    return np.linalg.cholesky(np.linalg.inv(A)).T


def metrics(U, d):
    """M_P = U_PP^-1 U_PP^-T of every vector of d columns."""
    roots = [np.linalg.inv(U[p:p + d, p:p + d]) for p in range(0, len(U), d)]
    return [root @ root.T for root in roots]


# ---- EM

def nearest(x, centroids, M):
    """argmin_k (x - c_k)^T M (x - c_k); the first of equals."""
    gaps = x - centroids
    return int(np.argmin(((gaps @ M) * gaps).sum(1)))


def all_signs(centroids):
    """[K, d] -> [2^d K, d], what the codes of a signed format stand for: bit i above a centroid's number negates weight i."""
    d = centroids.shape[1]
    return np.concatenate([centroids * [1 - 2 * (s >> i & 1) for i in range(d)] for s in range(2 ** d)])


def e_step(points, M, centroids):
    return [nearest(x, centroids, m) for x, m in zip(points, M)]


def m_step(points, M, index, centroids):
    """c_k = (sum M)^-1 sum M x; centroids without weight take the points farthest from their own centroids."""
    new, empty = np.array(centroids, dtype=float), []
    for k in range(len(centroids)):
        total, moment = 0, 0
        for x, m, i in zip(points, M, index):
            if i == k:
                total, moment = total + m, moment + m @ x
        if np.trace(np.atleast_2d(total)) > 0:
            new[k] = np.linalg.solve(total, moment)
        else:
            empty.append(k)
    far = [(x - centroids[i]) @ m @ (x - centroids[i]) for x, m, i in zip(points, M, index)]
    for k, n in zip(empty, np.argsort(-np.array(far), kind="stable")):
        if far[n] > 0:
            new[k] = points[n]
    return new


def em(points, M, centroids, iterations):
    before = None
    for _ in range(iterations):
        index = e_step(points, M, centroids)
        if index == before:
            break
        centroids, before = m_step(points, M, index, centroids), index
    return centroids


def em_loss(points, M, centroids):
    return sum(min((x - c) @ m @ (x - c) for c in centroids) for x, m in zip(points, M))


def seed(points, k):
    """Points at k equally spaced ranks of the Mahalanobis distance from the mean."""
    centred = points - points.mean(0)
    inverse = np.linalg.inv(centred.T @ centred / len(points))
    order = np.argsort([x @ inverse @ x for x in centred], kind="stable")
    return np.array([points[order[round(i * (len(points) - 1) / (k - 1))]] for i in range(k)])


# ---- assignment and propagation

def quantize_and_propagate(W, A, tables, order, d, scale):
    """The textbook loop, not blocked: vectors in `order`, E_P = (W_P - Q_P) U_PP^-1, later columns less E_P U[P, later]."""
    columns = [v * d + i for v in order for i in range(d)]
    U, current = factor(A[np.ix_(columns, columns)]), W[:, columns].copy()
    index, Q = np.zeros((len(W), len(order)), int), np.zeros_like(W)
    for step, v in enumerate(order):
        P = slice(step * d, step * d + d)
        root = np.linalg.inv(U[P, P])
        for r in range(len(W)):
            s = scale[r][v]
            index[r, v] = nearest(current[r, P] / s, tables[r][v], s * s * root @ root.T)
            q = s * tables[r][v][index[r, v]]
            Q[r, v * d:v * d + d] = q
            error = (current[r, P] - q) @ root
            current[r, P.stop:] -= error @ U[P, P.stop:]
    return index, Q


def quantize_and_resolve(W, A, tables, order, d, scale):
    """The same from first principles: before each choice the columns not yet quantized are solved for exactly.

    Given W - Q on the columns done, the best others are W + (W - Q) A_done,rest A_rest,rest^-1, and a further error delta
    on P, all others re-optimised, costs delta ((A_rest,rest^-1)_PP)^-1 delta^T.
    """
    index, Q = np.zeros((len(W), len(order)), int), np.zeros_like(W)
    done = []
    for step, v in enumerate(order):
        rest = [u * d + i for u in order[step:] for i in range(d)]
        inverse = np.linalg.inv(A[np.ix_(rest, rest)])
        M = np.linalg.inv(inverse[:d, :d])
        for r in range(len(W)):
            best = W[r, rest] + (W[r, done] - Q[r, done]) @ A[np.ix_(done, rest)] @ inverse
            s = scale[r][v]
            index[r, v] = nearest(best[:d] / s, tables[r][v], s * s * M)
            Q[r, v * d:v * d + d] = s * tables[r][v][index[r, v]]
        done += rest[:d]
    return index, Q


# ---- refinement

def decode(index, tables, scale, d):
    Q = np.zeros((len(index), index.shape[1] * d))
    for r in range(index.shape[0]):
        for v in range(index.shape[1]):
            Q[r, v * d:v * d + d] = scale[r][v] * tables[r][v][index[r, v]]
    return Q


def best_codebooks(W, H, index, strip, k, d, scale):
    """Centroids [strips, K, d] of least loss for the rows of one row group: the full least-squares system."""
    values, vectors = np.linalg.eigh(H)
    root = vectors * np.sqrt(np.maximum(values, 0))              # H = root root^T, so the loss is ||(W - Q) root||^2
    strips = max(strip) + 1
    system, right = [], []
    for r in range(len(W)):
        place = np.zeros((W.shape[1], strips * k * d))           # row of weights = place @ centroids
        for v in range(index.shape[1]):
            for i in range(d):
                place[v * d + i, (strip[v] * k + index[r, v]) * d + i] = scale[r][v]
        system.append(root.T @ place)
        right.append(root.T @ W[r])
    solution = np.linalg.lstsq(np.concatenate(system), np.concatenate(right), rcond=None)[0]
    return solution.reshape(strips, k, d)


def coordinate_descent(W, H, index, tables, d, scale):
    """One sweep, left to right: every index to the centroid of least full loss, all others as they stand."""
    index = index.copy()
    Q = decode(index, tables, scale, d)
    for v in range(index.shape[1]):
        P = slice(v * d, v * d + d)
        for r in range(len(W)):
            costs = []
            for c in tables[r][v]:
                Q[r, P] = scale[r][v] * c
                costs.append((W[r] - Q[r]) @ H @ (W[r] - Q[r]))
            index[r, v] = int(np.argmin(costs))
            Q[r, P] = scale[r][v] * tables[r][v][index[r, v]]
    return index


def adam(c, gradient, steps=25, lr=1e-3):
    m, v = np.zeros_like(c), np.zeros_like(c)
    for t in range(1, steps + 1):
        g = gradient(c)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        c = c - lr * (m / (1 - 0.9 ** t)) / (np.sqrt(v / (1 - 0.999 ** t)) + 1e-8)
    return c


# ---- storage

def scales(W, block, norm=0, reach=6):
    """Codes [rows, blocks] and (z, a) in float16: log2 of each block's norm to 4 bits, per column of blocks.

    norm 0 is max|w|, p the p-th root of the mean of |w|^p.  reach: octaves below the block that a tenth are larger than."""
    blocks = math.ceil(W.shape[1] / block)
    codes, za = np.zeros((len(W), blocks), int), np.zeros((blocks, 2))
    for b in range(blocks):
        parts = [np.abs(w[b * block:(b + 1) * block]) for w in W]
        log = [math.log2(np.mean(part ** norm) ** (1 / norm) if norm else part.max()) for part in parts]
        low = max(min(log), sorted(log)[-math.ceil(len(log) / 10)] - reach)
        z, a = float(np.float16(low)), float(np.float16((max(log) - low) / 15))
        za[b] = z, a
        for r, value in enumerate(log):
            codes[r, b] = 0 if a == 0 else min(max(round((value - z) / a), 0), 15)
    return codes, za


def bfloat16_above(value):
    """The smallest bfloat16 not below a positive float32."""
    bits = int(np.float32(value).view(np.uint32))
    return float(np.uint32((bits + 0xFFFF) & 0xFFFF0000).view(np.float32))


def int8(centroids):
    """One codebook -> (integers within +-127, their scale)."""
    peak = np.abs(centroids).max()
    scale = bfloat16_above(peak / 127) if peak > 0 else 1.0
    return np.clip(np.round(centroids / scale), -127, 127), scale


def bits_per_value(rows, cols, dim, k, group_rows, group_cols, scale_block=0):
    """log2(K)/d + K d 8/l + 16/l + 4/N_s + 32/(r N_s), for shapes that all sizes divide."""
    l = group_rows * group_cols
    total = math.log2(k) / dim + k * dim * 8 / l + 16 / l
    return total + (4 / scale_block + 32 / (rows * scale_block) if scale_block else 0)


# ---- the whole of one pass

def one_pass(W, H, spec, damp, iterations, order="importance", paper=False):
    """Codes and centroids before any refinement -> (index, tables, centroids [row groups, strips, K, d], scale).

    "importance": scales and codebooks from the weights as they are, vectors by descending diag H. "sequential": strip by
    strip on the current weights. `paper`: EM weights U_jj; assignment and propagation with the diagonal of U only; scaled
    weights assigned as they were at the start of their block (of up to 128 columns; here always a whole strip).
    """
    signed = (spec.dim, spec.index_bits) == (4, 3)          # 256 centroids of absolute values; the EM weighs each dimension by itself
    d, k = spec.dim, 256 if signed else 2 ** round(spec.index_bits * spec.dim)
    vectors = math.ceil(spec.cols / d)
    n = vectors * d
    W = np.pad(W, ((0, 0), (0, n - spec.cols)))
    A = damped(np.pad(H, (0, n - spec.cols)), damp)
    visit = list(range(vectors))
    if order == "importance":
        visit.sort(key=lambda v: -sum(A[j, j] for j in range(v * d, v * d + d)))
    columns = [v * d + i for v in visit for i in range(d)]
    U, current = factor(A[np.ix_(columns, columns)]), W.copy()
    diagonal = [np.diag(np.diag(U)[p:p + d]) for p in range(0, n, d)]
    fit = {v: (diagonal if paper else metrics(U, d))[i] for i, v in enumerate(visit)}
    strip = [v * d // spec.group_cols for v in range(vectors)]
    group = [r // spec.group_rows for r in range(spec.rows)]
    scale = np.ones((spec.rows, vectors))
    centroids = np.zeros((max(group) + 1, max(strip) + 1, k, d))

    def fit_strip(s):
        mine = [v for v in range(vectors) if strip[v] == s]
        if spec.scale_block:
            first, last = mine[0] * d, min(mine[-1] * d + d, spec.cols)
            codes, za = scales(current[:, first:last], spec.scale_block, 4 if (spec.index_bits == 2 or signed) and not paper else 0,
                               math.inf if paper else 6)
            for v in mine:
                b = (v * d - first) // spec.scale_block
                scale[:, v] = np.float32(2.0 ** (za[b, 0] + za[b, 1] * codes[:, b]))
        for g in set(group):
            rows = [r for r in range(spec.rows) if group[r] == g]
            points = np.array([current[r, v * d:v * d + d] / scale[r, v] for r in rows for v in mine])
            M = [scale[r, v] ** 2 * fit[v] for r in rows for v in mine]
            if signed:
                points, M = np.abs(points), [np.diag(np.diag(m)) for m in M]
            centroids[g, s] = em(points, M, seed(points, k), iterations)

    if order == "importance":
        for s in set(strip):
            fit_strip(s)
    index = np.zeros((spec.rows, vectors), int)

    def table(r, v):
        c = centroids[group[r], strip[v]]
        return all_signs(c) if signed else c

    for step, v in enumerate(visit):
        if order == "sequential" and (step == 0 or strip[v] != strip[v - 1]):
            fit_strip(strip[v])
            at_start = current.copy()
        P, natural, later = slice(step * d, step * d + d), slice(v * d, v * d + d), columns[step * d + d:]
        root = np.linalg.inv(diagonal[step] if paper else U[P, P])
        for r in range(spec.rows):
            s, seen = scale[r, v], at_start if paper and spec.scale_block else current
            index[r, v] = nearest(seen[r, natural] / s, table(r, v), root @ root.T)
            error = (current[r, natural] - s * table(r, v)[index[r, v]]) @ root
            current[r, later] -= error @ U[P, P.stop:]
    tables = [[table(r, v) for v in range(vectors)] for r in range(spec.rows)]
    return index, tables, centroids, scale
