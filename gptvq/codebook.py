"""Codebooks: seeding, fitting by EM, and the int8 and SVD forms in which they are stored."""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import ops

if TYPE_CHECKING:
    from .ranks import Rows

_TRIAL_ITERATIONS = 10      # after these the better of two starts nearly always stays the better


@dataclass
class Codebooks:
    """Centroids [row groups, strips, K, d] as floats and, once compressed, the stored tables that give exactly them."""

    centroids: Tensor
    tables: dict[str, Tensor] | None = None     # {"cb"} or {"cb_u", "cb_v"}
    gs: Tensor | None = None                    # bf16 [row groups, strips]


def seed(x: Tensor, weight: Tensor, k: int) -> Tensor:
    """Mahalanobis seeding: x [G, N, d], weight [G, N] (0: padding) -> [G, k, d] points of x.

    The points sorted by (x - mean)^T S^-1 (x - mean), taken at equally spaced ranks (arXiv 2402.15319, section 3.2).
    """
    valid = (weight > 0).to(x.dtype).unsqueeze(-1)
    count = valid.sum(1, keepdim=True).clamp_min(1)
    centred = (x - (x * valid).sum(1, keepdim=True) / count) * valid
    S = (centred.transpose(1, 2) @ centred / count).double()
    d = x.shape[2]
    trace = S.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(torch.float64).tiny)
    S = S / trace[:, None, None] + 1e-6 * torch.eye(d, dtype=S.dtype, device=x.device)   # flat groups stay invertible
    y = torch.linalg.solve(S, centred.double().transpose(1, 2)).transpose(1, 2)
    distance = (y * centred).sum(2).masked_fill(valid[..., 0] == 0, torch.inf)
    order = distance.argsort(dim=1, stable=True)
    rank = torch.arange(k, device=x.device) * (count[:, 0] - 1) / max(k - 1, 1)
    picked = order.gather(1, rank.round().long())
    return x.gather(1, picked.unsqueeze(-1).expand(-1, -1, d))


def draw(x: Tensor, weight: Tensor, k: int, starts: int, rows: Rows | None = None) -> Tensor:
    """Random seeding: k points of each group of x [G, N, d], drawn by weight [G, N], always the same -> [starts, G, k, d].

    `rows`: of which share of a layer the groups are; they draw what they would among all groups of the layer.
    """
    generator = torch.Generator().manual_seed(0)
    first, total = (0, len(x)) if rows is None or rows.parts == 1 else (rows.before, rows.total)
    if x.device.type == "cpu":
        among = weight.new_ones(total, weight.shape[1], dtype=torch.float32)
        among[first: first + len(x)] = weight
        picked = torch.multinomial(among, starts * k, replacement=True, generator=generator)[first: first + len(x)]
    else:
        uniform = torch.rand(total, starts * k, dtype=torch.float64, generator=generator)[first: first + len(x)]
        picked = pick(weight, uniform.to(x.device))
    seeds = x.gather(1, picked.unsqueeze(-1).expand(-1, -1, x.shape[2]))
    return seeds.unflatten(1, (starts, k)).transpose(0, 1)


def pick(weight: Tensor, uniform: Tensor) -> Tensor:
    """weight [G, N], uniform [G, n] float64 in [0, 1) -> n points of each group, drawn by weight, long [G, n].

    The weights are summed as integers: on a GPU the order of a sum of floats, and with it the last point, could change from run to run.
    """
    peak = weight.amax(1, keepdim=True).double().clamp_min(torch.finfo(torch.float64).tiny)
    upto = (weight.double() / peak * 2 ** 28).round().long().cumsum(1)
    at = (uniform * upto[:, -1:]).long().minimum(upto[:, -1:] - 1)
    return torch.searchsorted(upto, at, right=True).clamp_max(weight.shape[1] - 1)


def fit(x: Tensor, metric: Tensor, weight: Tensor, k: int, iterations: int, starts: int = 1, rows: Rows | None = None) -> Tensor:
    """Seeds and fits all groups: x [G, N, d], metric [M, d, d], weight [G, N] >= 0 -> centroids [G, k, d].

    Point n has the metric weight[n] * metric[n % M]; weight 0 is padding, and s^2 under block scales s. One start is the
    Mahalanobis seeding; of several, which are random (always the same), every group goes on from its best after a few
    iterations. The Mahalanobis seeding as one of 8 would move a layer's error by 0.5 % at most, either way.
    """
    if starts == 1 or x.shape[1] >= 1 << 24:            # more points are more than torch.multinomial takes
        return ops.fit(x, metric, weight, seed(x, weight, k)[None], ((iterations, 1),))
    return ops.fit(x, metric, weight, draw(x, weight, k, starts, rows), ((min(iterations, _TRIAL_ITERATIONS), 1), (iterations, 1)))


def compress(centroids: Tensor, least: int = -127) -> Codebooks:
    """Rounds to int8 from `least` to 127 with one bf16 scale per codebook -> the codebooks that are stored."""
    peak = centroids.abs().amax((2, 3))
    gs = table_scale(peak)
    cb = (centroids / gs[..., None, None].to(centroids.dtype)).round().clamp(least, 127).to(torch.int8)
    if least > 0:
        gs = torch.where(peak > 0, gs, torch.zeros_like(gs))            # zeros are nothing but this scale times whatever is stored
    return Codebooks(stored(cb, gs, centroids.dtype), {"cb": cb.transpose(2, 3).contiguous()}, gs)


def stored(cb: Tensor, gs: Tensor, dtype: torch.dtype) -> Tensor:
    """int8 [.., K, d] and bf16 scales -> the float values that decoding gives (a float32 product)."""
    return (cb.float() * gs.float()[..., None, None]).to(dtype)


def expand(cb_u: Tensor, cb_v: Tensor) -> Tensor:
    """SVD factors s8 [row groups, strips, rank], f16 [rank, K] -> s8 [row groups, strips, K], summed in float32 in rank order."""
    u, v = cb_u.float(), cb_v.float()
    table = u.new_zeros(*u.shape[:2], v.shape[1])
    for r in range(len(v)):
        table += u[..., r, None] * v[r]
    return table.round().clamp(-127, 127).to(torch.int8)


def table_scale(peak: Tensor) -> Tensor:
    """Largest |entry| -> the smallest bf16 scale with |entry| / scale <= 127; 1 for a codebook of zeros."""
    need = torch.where(peak > 0, peak / 127, torch.ones_like(peak)).float()
    scale = need.to(torch.bfloat16)
    up = (scale.view(torch.int16) + 1).view(torch.bfloat16)
    return torch.where(scale.float() < need, up, scale)
