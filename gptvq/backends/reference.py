"""Plain PyTorch on any device: the semantics of every operator."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# The operators on packed weights belong to this backend too.
from .reference_packed import (  # noqa: F401
    bit_map,
    centroid_numbers,
    dequantize,
    linear,
    pack_codes,
    prepare_linear,
    sign_changes,
    unpack_codes,
)


def matvec(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def matmul(A: Tensor, B: Tensor) -> Tensor:
    return A @ B


def submatmul(C: Tensor, A: Tensor, B: Tensor) -> None:
    C.sub_(A @ B)


def gram(total: Tensor, x: Tensor) -> None:
    """total += x^T x for x [n, cols] of any float dtype; only the upper triangle of `total` [cols, cols] counts."""
    total.addmm_(x.to(total.dtype).T, x.to(total.dtype))


def cross(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total [p, q] += a^T b for a [n, p], b [n, q] of any float dtype."""
    total.addmm_(a.to(total.dtype).T, b.to(total.dtype))


def quadratic_features(x: Tensor, metric: Tensor) -> Tensor:
    """x [.., d], metric [.., d, d] -> [.., d + d(d+1)/2] with (x-c)^T M (x-c) = x^T M x + features . centroid_features(c)."""
    i, j = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
    double = torch.where(i == j, 1.0, 2.0).to(x.dtype)
    linear = (metric * x.unsqueeze(-2)).sum(-1)
    return torch.cat([-2 * linear, metric[..., i, j] * double], -1)


def centroid_features(c: Tensor) -> Tensor:
    """Centroids [.., d] -> [.., d + d(d+1)/2]: the values and their products."""
    i, j = torch.triu_indices(c.shape[-1], c.shape[-1], device=c.device)
    return torch.cat([c, c[..., i] * c[..., j]], -1)


def nearest(features: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """features [G, N, F], centroids [G, K, d] -> (distance less its constant, index) [G, N]; the first of equals wins."""
    psi = centroid_features(centroids).transpose(1, 2)
    groups, points = features.shape[:2]
    value = features.new_empty(groups, points)
    index = torch.empty(groups, points, dtype=torch.long, device=features.device)
    take = max(1, (1 << 22) // psi.shape[2])          # points x centroids at a time: keeps the scores near the cache
    step = max(1, take // points)
    for g in range(0, groups, step):
        for n in range(0, points, take):
            at = slice(g, g + step), slice(n, n + take)
            value[at], index[at] = torch.bmm(features[at], psi[at[0]]).min(2)
    return value, index


def em(x: Tensor, metric: Tensor, centroids: Tensor, iterations: int) -> Tensor:
    """Weighted k-means: x [G, N, d], metric [G, N, d, d], seeds [G, K, d] -> centroids [G, K, d].

    E-step: index = argmin_k (x - c_k)^T M (x - c_k).  M-step: c_k = (sum M)^-1 sum M x.  A group stops exactly when no
    index changed.  A centroid without points moves to the point that is farthest from its own.  Points of metric zero
    (padding) have no influence.  Sums are float64.
    """
    if x.shape[2] == 1:
        return _em_1d(x[..., 0], metric[..., 0, 0], centroids[..., 0], iterations).unsqueeze(-1)
    features, spread = quadratic_features(x, metric), ((metric * x.unsqueeze(-2)).sum(-1) * x).sum(-1)
    out, left = centroids.clone(), torch.arange(len(x), device=x.device)
    before = None
    for _ in range(iterations):
        value, index = nearest(features, out[left])
        moved = (index != before).any(1) if before is not None else torch.ones(len(left), dtype=torch.bool, device=x.device)
        if not bool(moved.all()):
            left, x, features, spread, value, index = (t[moved] for t in (left, x, features, spread, value, index))
            if not len(left):
                break
        new, empty = _m_step(features, index, out.shape[1], x.shape[2])
        out[left] = _reseed(new, empty, out[left], x, spread + value)
        before = index
    return out


def distortion(x: Tensor, metric: Tensor, centroids: Tensor) -> Tensor:
    """sum_n min_k (x - c_k)^T M (x - c_k) per group: x [G, N, d], metric [G, N, d, d], centroids [G, K, d] -> float64 [G]."""
    spread = ((metric * x.unsqueeze(-2)).sum(-1) * x).sum(-1)
    return (spread + nearest(quadratic_features(x, metric), centroids)[0]).double().sum(1)


def fit(x: Tensor, metric: Tensor, weight: Tensor, seeds: Tensor, rounds: tuple[tuple[int, int], ...]) -> Tensor:
    """The best codebook of each group: x [G, N, d], metric [M, d, d], weight [G, N], seeds [starts, G, K, d] -> [G, K, d].

    Point n has the metric weight[n] * metric[n % M].  In every round (iterations, keep) all starts that are left take that
    many steps of `em`, and the `keep` with the least loss before the last of them go on; the last round's best is the result.
    """
    weighted, tried = metric.repeat(x.shape[1] // len(metric), 1, 1) * weight[..., None, None], seeds
    for iterations, keep in rounds:
        tried = torch.stack([em(x, weighted, c, iterations - 1) for c in tried])
        best = torch.stack([distortion(x, weighted, c) for c in tried]).argsort(dim=0, stable=True)[:keep]
        tried = tried[best, torch.arange(len(x), device=x.device)]
        tried = torch.stack([em(x, weighted, c, 1) for c in tried])
    return tried[0]


def _m_step(features: Tensor, index: Tensor, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Weighted means [G, K, d] and which centroids got no point [G, K]."""
    groups = len(index)
    slot = (index + torch.arange(groups, device=index.device)[:, None] * k).flatten()
    sums = torch.stack([torch.bincount(slot, f.flatten().double(), groups * k) for f in features.unbind(-1)], -1)
    sums = sums.view(groups, k, -1)
    i, j = torch.triu_indices(d, d, device=index.device)
    total = sums.new_zeros(groups, k, d, d)
    total[..., i, j] = total[..., j, i] = sums[..., d:] * torch.where(i == j, 1.0, 0.5).double()
    empty = total.diagonal(dim1=-2, dim2=-1).sum(-1) <= 0
    total[empty] = torch.eye(d, dtype=total.dtype, device=total.device)
    return solve_small(total, -0.5 * sums[..., :d]).to(features.dtype), empty


def _reseed(new: Tensor, empty: Tensor, old: Tensor, x: Tensor, distance: Tensor) -> Tensor:
    """Empty centroids move to the points farthest from their centroid, or stay where none is off its centroid."""
    for g in empty.any(1).nonzero().flatten().tolist():
        slots = empty[g].nonzero().flatten()
        far, at = distance[g].topk(min(len(slots), distance.shape[1]))
        new[g, slots] = old[g, slots]
        use = far > 0
        new[g, slots[: len(at)][use]] = x[g, at[use]]
    return new


def _em_1d(x: Tensor, metric: Tensor, centroids: Tensor, iterations: int) -> Tensor:
    """x, metric [G, N], centroids [G, K]: sorted once, so a cluster is a range and its sums are prefix differences."""
    k = centroids.shape[1]
    x, order = x.double().masked_fill(metric <= 0, torch.inf).sort(1)
    weight = metric.double().gather(1, order)
    value = x.nan_to_num(posinf=0.0)
    zero = weight.new_zeros(len(x), 1)
    mass, moment = (torch.cat([zero, t.cumsum(1)], 1) for t in (weight, weight * value))
    out, left, before = centroids.double().sort(1).values, torch.arange(len(x), device=x.device), None
    for _ in range(iterations):
        mid = (out[left, 1:] + out[left, :-1]) / 2
        cut = torch.searchsorted(x[left], mid, right=True)      # of equals the lower centroid wins
        if before is not None:
            moved = (cut != before).any(1)
            left, cut = left[moved], cut[moved]
            if not len(left):
                break
        ends = torch.cat([cut.new_zeros(len(left), 1), cut, cut.new_full((len(left), 1), x.shape[1])], 1)
        total, first = (t[left].gather(1, ends).diff(dim=1) for t in (mass, moment))
        empty = total <= 0
        new = torch.where(empty, out[left], first / total.masked_fill(empty, 1))
        if bool(empty.any()):
            member = torch.searchsorted(cut, torch.arange(x.shape[1], device=x.device).expand(len(left), -1).contiguous(), right=True)
            distance = weight[left] * (value[left] - out[left].gather(1, member)) ** 2
            new = _reseed(new.unsqueeze(-1), empty, out[left].unsqueeze(-1), value[left].unsqueeze(-1), distance).squeeze(-1)
        out[left], before = new.sort(1).values, cut
    return out.to(centroids.dtype)


def all_signs(centroids: Tensor) -> Tensor:
    """[.., 256, d] -> [.., 2^d 256, d]: what each code of a signed format stands for."""
    codes = torch.arange(256 << centroids.shape[-1], dtype=torch.int16, device=centroids.device)
    return centroids[..., centroid_numbers(codes), :] * sign_changes(codes, centroids.shape[-1]).to(centroids.dtype)


def assign(x: Tensor, metric: Tensor, centroids: Tensor, group_rows: int) -> Tensor:
    """One vector column: x [rows, d], metric [d, d], centroids [row groups, K, d] -> index [rows]; the first of equals wins."""
    groups, k, d = centroids.shape
    y = torch.nn.functional.pad(x @ metric, (0, 0, 0, groups * group_rows - len(x))).view(groups, group_rows, d)
    bias = ((centroids @ metric) * centroids).sum(-1, keepdim=True).transpose(1, 2)
    return torch.baddbmm(bias, y, centroids.transpose(1, 2), alpha=-2).min(2).indices.flatten()[: len(x)]


def decode(index: Tensor, centroids: Tensor, strip: Tensor, scale: Tensor | None, group_rows: int) -> Tensor:
    """index [rows, n], centroids [row groups, strips, K, d], strip [n], scale [rows, n] or None -> Q [rows, n d].

    An index of int16 is that of a signed format: the number of a centroid, K = 256, and above it a bit for each weight of the vector that
    is its negative.
    """
    group, flips = torch.arange(len(index), device=index.device)[:, None] // group_rows, sign_changes(index, centroids.shape[3])
    vectors = centroids[group, strip, centroid_numbers(index)]
    if flips is not None:
        vectors = vectors * flips.to(vectors.dtype)
    return (vectors if scale is None else vectors * scale.unsqueeze(-1)).reshape(len(index), -1)


def collect(index: Tensor, values: Tensor, strip: Tensor, group_rows: int, shape: tuple[int, int, int]) -> Tensor:
    """values [rows, n, f] summed in float64 per centroid; shape (row groups, strips, K) -> [row groups, strips, K, f].

    Of a signed format (see `decode`, four dimensions) f is 4 or 16, vectors or forms, which change their signs as their weights do.
    """
    group, flips = torch.arange(len(index), device=index.device)[:, None] // group_rows, sign_changes(index, 4)
    slot = ((group * shape[1] + strip) * shape[2] + centroid_numbers(index)).flatten()
    sums = []
    for i, v in enumerate(values.unbind(-1)):
        if flips is not None:
            v = v * (flips[..., i] if values.shape[2] == 4 else flips[..., i // 4] * flips[..., i % 4])
        sums.append(torch.bincount(slot, v.flatten().double(), shape[0] * shape[1] * shape[2]))
    return torch.stack(sums, -1).view(*shape, -1)


def column_block(W: Tensor, U: Tensor, roots: Tensor, centroids: Tensor, strip: Tensor, scale: Tensor | None,
                 group_rows: int, stale: bool = False, signed: bool = False) -> tuple[Tensor, Tensor]:
    """Quantizes a block of n vectors one after the other and propagates each error to the rest of the block.

    W [rows, n d] current weights in visiting order; U [n d, n d] the block of the factor; roots [n, d, d] = U_PP^-1;
    centroids [row groups, strips, K, d]; strip [n]; scale [rows, n] or None.  Returns (index [rows, n], E [rows, n d])
    with E_P = (W_P - Q_P) U_PP^-1, from which the caller updates the columns after the block. `stale` reproduces a defect of
    the published code: under block scales it assigns the weights as they were at the start of the block. `signed`: all changes of sign
    of the centroids are tried, and the index is of int16, see `decode`; which of equals wins there is up to a backend.
    """
    n, d = roots.shape[:2]
    start, W, E = W, W.clone(), torch.empty_like(W)
    index = torch.empty(len(W), n, dtype=torch.int16 if signed else torch.uint8, device=W.device)
    group = torch.arange(len(W), device=W.device) // group_rows
    for i, s in enumerate(strip.tolist()):
        at = slice(i * d, i * d + d)
        x = W[:, at] if scale is None else (start if stale else W)[:, at] / scale[:, i, None]
        books = all_signs(centroids[:, s]) if signed else centroids[:, s]
        index[:, i] = assign(x, roots[i] @ roots[i].T, books, group_rows)
        q = books[group, index[:, i].long()]
        E[:, at] = (W[:, at] - (q if scale is None else q * scale[:, i, None])) @ roots[i]
        W[:, at.stop:] -= E[:, at] @ U[at, at.stop:]
    return index, E


def descent_block(R: Tensor, H: Tensor, index: Tensor, centroids: Tensor, strip: Tensor, scale: Tensor | None,
                  group_rows: int) -> tuple[Tensor, Tensor]:
    """Moves each index of a block, vector after vector, to the centroid of least true loss.

    R [rows, n d] = ((W - Q) H) on the block's columns, H [n d, n d] positive definite on each vector; index [rows, n]; the
    rest as in column_block.  With all else fixed the loss of centroid c is ||c - (q + R_P H_PP^-1)||^2 in the metric H_PP.
    Returns (new index, change of Q [rows, n d]).  With an index of int16 all changes of sign are tried too, see `decode`.
    """
    d, index, R = centroids.shape[-1], index.clone(), R.clone()
    change = torch.empty_like(R)
    group = torch.arange(len(R), device=R.device) // group_rows
    for i, s in enumerate(strip.tolist()):
        at = slice(i * d, i * d + d)
        size = 1 if scale is None else scale[:, i, None]
        books = all_signs(centroids[:, s]) if index.dtype is torch.int16 else centroids[:, s]
        q = books[group, index[:, i].long()] * size
        target = q + solve_small(H[at, at].expand(len(R), d, d), R[:, at])
        index[:, i] = assign(target / size, H[at, at], books, group_rows)
        change[:, at] = books[group, index[:, i].long()] * size - q
        R -= change[:, at] @ H[at]
    return index, change


def solve_small(A: Tensor, b: Tensor) -> Tensor:
    """A^-1 b for many small symmetric positive definite A [.., d, d], b [.., d]."""
    if A.shape[-1] == 1:
        return b / A[..., 0]
    if A.shape[-1] == 2:
        p, q, r = A[..., 0, 0], A[..., 0, 1], A[..., 1, 1]
        ratio = q / p           # elimination, not the determinant: that one overflows float32 from entries of 1e19 on
        second = (b[..., 1] - ratio * b[..., 0]) / (r - ratio * q)
        return torch.stack([b[..., 0] / p - ratio * second, second], -1)
    return torch.linalg.solve(A, b.unsqueeze(-1)).squeeze(-1)
