"""The CUDA kernels that solve: codebooks, a block of columns, coordinate descent.  Nothing here waits for the device."""
from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError
from . import cuda_call, reference
from .cuda_call import call, dense

BLOCK_COLS = 128        # columns that one launch takes; wider blocks are taken in parts


def _all_float32(*tensors: Tensor | None) -> bool:
    return all(t is None or t.dtype == torch.float32 for t in tensors)


def _in_rows(t: Tensor | None) -> Tensor | None:
    """`t` as it is if its rows are contiguous, however far apart."""
    return t if t is None or t.stride(-1) == 1 and t.stride(0) >= t.shape[1] else t.contiguous()


def fit(x: Tensor, metric: Tensor, weight: Tensor, seeds: Tensor, rounds: tuple[tuple[int, int], ...]) -> Tensor:
    if not _all_float32(x, metric, weight, seeds):
        return reference.fit(x, metric, weight, seeds, rounds)
    starts, groups, k, d = seeds.shape
    x, metric, weight = dense(x, 16), dense(metric), dense(weight)
    try:
        large = cuda_call.kernels.fit_plan(groups, x.shape[1], d, k, starts, len(metric), x.device.index or 0)["scratch"]
    except ValueError as error:
        raise ConfigError(f"fit: {error}") from None
    if d == 1:
        scratch = None
        if large:
            weight = weight * metric.flatten().repeat(x.shape[1] // len(metric))
            x, order = x[..., 0].masked_fill(weight <= 0, torch.inf).sort(dim=1, stable=True)
            x, weight = x.unsqueeze(-1), weight.gather(1, order)
            scratch = cuda_call.empty(groups, 2, x.shape[1] + 1, dtype=torch.float64, device=x.device)
        centroids = cuda_call.empty(groups, k, d, dtype=torch.float32, device=x.device)
        call("fit_1d", x, metric, weight, dense(seeds), [tuple(r) for r in rounds], centroids, scratch)
        return centroids
    tried = seeds.clone(memory_format=torch.contiguous_format)
    for iterations, keep in rounds:
        starts = len(tried)
        loss = cuda_call.empty(starts, groups, dtype=torch.float64, device=x.device) if starts > 1 else None
        scratch = cuda_call.empty(groups, starts, x.shape[1], dtype=torch.uint8, device=x.device) if large else None
        call("fit_round", x, metric, weight, tried, iterations, loss, scratch)
        if starts > 1:
            best = loss.argsort(dim=0, stable=True)[:keep]
            tried = tried[best, torch.arange(groups, device=x.device)].contiguous()
    return tried[0]


def column_block(W: Tensor, U: Tensor, roots: Tensor, centroids: Tensor, strip: Tensor, scale: Tensor | None,
                 group_rows: int, stale: bool = False, signed: bool = False) -> tuple[Tensor, Tensor]:
    if not _all_float32(W, U, roots, centroids, scale):
        return reference.column_block(W, U, roots, centroids, strip, scale, group_rows, stale, signed)
    roots, centroids = dense(roots), dense(centroids, 16)

    def part(at: slice, cols: slice, left: Tensor) -> tuple[Tensor, Tensor]:
        index = cuda_call.empty(len(W), len(strip[at]), dtype=torch.int16 if signed else torch.uint8, device=W.device)
        E = cuda_call.empty(*left.shape, dtype=torch.float32, device=W.device)
        call("column_block", _in_rows(left), _in_rows(U[cols, cols]), roots[at], centroids, dense(strip[at]),
             None if scale is None else _in_rows(scale[:, at]), group_rows,
             _in_rows(W[:, cols]) if stale and scale is not None else None, index, E)
        return index, E

    return _in_parts(W, U, roots.shape[1], part)


def descent_block(R: Tensor, H: Tensor, index: Tensor, centroids: Tensor, strip: Tensor, scale: Tensor | None,
                  group_rows: int) -> tuple[Tensor, Tensor]:
    if not _all_float32(R, H, centroids, scale):
        return reference.descent_block(R, H, index, centroids, strip, scale, group_rows)
    centroids = dense(centroids, 16)

    def part(at: slice, cols: slice, left: Tensor) -> tuple[Tensor, Tensor]:
        before = index[:, at]
        codes = cuda_call.empty(*before.shape, dtype=index.dtype, device=R.device).copy_(before)
        change = cuda_call.empty(*left.shape, dtype=torch.float32, device=R.device)
        call("descent_block", _in_rows(left), _in_rows(H[cols, cols]), centroids, dense(strip[at]),
             None if scale is None else _in_rows(scale[:, at]), group_rows, codes, change)
        return codes, change

    return _in_parts(R, H, centroids.shape[3], part)


def _in_parts(left: Tensor, factor: Tensor, d: int, part) -> tuple[Tensor, Tensor]:
    """part(vectors, columns, what is left of them) -> (codes, change) over all columns, each change taken from all later ones."""
    cols = left.shape[1]
    if cols <= BLOCK_COLS:
        return part(slice(None), slice(None), left)
    left, results = left.clone(), []
    for first in range(0, cols, BLOCK_COLS):
        at = slice(first, min(first + BLOCK_COLS, cols))
        results.append(part(slice(at.start // d, at.stop // d), at, left[:, at]))
        reference.submatmul(left[:, at.stop:], results[-1][1], factor[at, at.stop:])
    return tuple(torch.cat(parts, 1) for parts in zip(*results))
