"""What follows a pass: the exact codebook update for given codes, and coordinate descent over the codes."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import codebook, ops
from .codebook import Codebooks
from .problem import Problem


def conjugate_gradient(apply: Callable[[Tensor], Tensor], x: Tensor, r: Tensor, precondition: Callable[[Tensor], Tensor],
                       iterations: int, dims: tuple[int, ...], tolerance: float = 1e-4) -> Tensor:
    """x moved towards A x = A x0 + r, A = `apply` positive semidefinite, r the residual at x0 = `x`.

    Systems that do not interact run side by side: inner products are taken over `dims` only. Stops once every
    preconditioned residual norm has fallen by `tolerance`.
    """
    def dot(a, b):
        return (a * b).sum(dims, keepdim=True)

    z = precondition(r)
    p, rz = z, dot(r, z)
    stop = rz * tolerance ** 2
    for _ in range(iterations):
        live = rz > stop
        if not bool(live.any()):
            break
        Ap = apply(p)
        curve = dot(p, Ap)
        live = live & (curve > 0)
        step = torch.where(live, rz / curve.masked_fill(~live, 1), 0.0)
        x, r = x + step * p, r - step * Ap
        z = precondition(r)
        rz, last = dot(r, z), rz
        p = z + torch.where(live, rz / last.masked_fill(~live, 1), 0.0) * p
    return x


def update_codebook(problem: Problem, index: Tensor, centroids: Tensor, iterations: int, pull: Tensor | None = None) -> Tensor:
    """The centroids of least loss for fixed codes, by preconditioned conjugate gradient from `centroids`.

    The loss is quadratic in the centroids and row groups do not interact. Preconditioner: the d x d diagonal blocks.
    Centroids without vectors keep their values.  pull: (W - Q) H of these codes and centroids, where it is known.
    """
    block = problem.curvature(index)
    size = block.diagonal(dim1=-2, dim2=-1).sum(-1)
    used = size > 0
    eye = torch.eye(block.shape[-1], dtype=block.dtype, device=block.device)
    inverse = torch.linalg.inv(torch.where(used[..., None, None], block + 1e-6 * size[..., None, None] * eye, eye))
    x = conjugate_gradient(
        lambda p: problem.gradient(index, problem.decode(index, p.to(centroids.dtype))), centroids.double(),
        problem.gradient(index, problem.W - problem.decode(index, centroids)) if pull is None else problem.gather(index, pull),
        lambda r: (inverse @ r.unsqueeze(-1)).squeeze(-1) * used.unsqueeze(-1), iterations, (1, 2, 3))
    return x.to(centroids.dtype)


def svd_codebook(problem: Problem, index: Tensor, centroids: Tensor, iterations: int = 10, rounds: int = 2) -> tuple[Tensor, Codebooks]:
    """1D codebooks as int8 U [groups, rank] times fp16 V [rank, K] -> (remapped index, codebooks).

    Each codebook is sorted ascending so that all are alike, the stack is cut to `svd_rank` by SVD, and both factors are
    trained in turn on the layer loss, V once more after U is rounded (arXiv 2402.15319, section 3.3).
    """
    spec = problem.spec
    order = centroids[..., 0].argsort(dim=2, stable=True)
    rank_of = torch.empty_like(order).scatter_(2, order, torch.arange(spec.codewords, device=order.device).expand_as(order))
    index = rank_of[problem.group[:, None], problem.strip, index.long()].to(torch.uint8)
    table = centroids[..., 0].gather(2, order).double()
    gs = codebook.table_scale(table.abs().amax(2))
    scale = gs.double().unsqueeze(-1)
    left, s, V = torch.linalg.svd((table / scale).flatten(0, 1), full_matrices=False)
    short = max(0, spec.svd_rank - len(s))              # fewer codebooks than the rank: the rest of the factors stays zero
    U = torch.nn.functional.pad((left * s)[:, : spec.svd_rank], (0, short)).unflatten(0, table.shape[:2])
    V = torch.nn.functional.pad(V[: spec.svd_rank], (0, 0, 0, short))
    curvature = problem.curvature(index)[..., 0, 0] * scale ** 2

    def pull(t):            # gradient of the loss in the normalized table t [row groups, strips, K]
        return problem.gradient(index, t)[..., 0] * scale

    def decode(U, V):
        return problem.decode(index, (scale * (U @ V)).unsqueeze(-1).to(centroids.dtype))

    def fit_U(U, V):
        diagonal = (curvature @ V.square().T).clamp_min(1e-30)
        return conjugate_gradient(lambda p: pull(decode(p, V)) @ V.T, U, pull(problem.W - decode(U, V)) @ V.T,
                                  lambda r: r / diagonal, iterations, (1, 2))

    def fit_V(U, V):
        flat = U.flatten(0, 1)
        diagonal = (flat.square().T @ curvature.flatten(0, 1)).clamp_min(1e-30)
        return conjugate_gradient(lambda p: flat.T @ pull(decode(U, p)).flatten(0, 1), V,
                                  flat.T @ pull(problem.W - decode(U, V)).flatten(0, 1),
                                  lambda r: r / diagonal, iterations, (0, 1))

    for _ in range(rounds):
        U = fit_U(U, V)
        V = fit_V(U, V)
    unit = U.abs().amax((0, 1)).clamp_min(1e-30) / 127
    cb_u = (U / unit).round().clamp(-127, 127)
    cb_v = fit_V(cb_u, V * unit[:, None]).clamp(-6e4, 6e4).to(torch.float16)
    tables = {"cb_u": cb_u.to(torch.int8), "cb_v": cb_v}
    cb = codebook.expand(tables["cb_u"], cb_v).unsqueeze(-1)
    return index, Codebooks(codebook.stored(cb, gs, centroids.dtype), tables, gs)


def adam_codebook(problem: Problem, index: Tensor, centroids: Tensor, steps: int = 25, lr: float = 1e-3) -> Tensor:
    """The published codebook update: Adam on the layer loss (arXiv 2402.15319, section 3.2)."""
    parameter = torch.nn.Parameter(centroids.clone())
    optimizer = torch.optim.Adam([parameter], lr=lr)
    for _ in range(steps):
        residual = problem.W - problem.decode(index, parameter.data)
        parameter.grad = -2 * problem.gradient(index, residual).to(centroids.dtype)
        optimizer.step()
    return parameter.data


def absolute(problem: Problem, index: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """The same weights of a signed format by centroids without negative values: what was one changes the signs in the codes."""
    spec = problem.spec
    bits = 256 << torch.arange(spec.dim, device=index.device)
    change = ((centroids < 0) * bits).sum(-1).to(index.dtype)           # [row groups, strips, K]
    if bool(change.any()):
        index = index ^ change[problem.group[:, None], problem.strip, index.long() & 255]
    return index, centroids.abs()


def coordinate_descent(problem: Problem, index: Tensor, centroids: Tensor, block_cols: int, pull: Tensor) -> tuple[Tensor, Tensor]:
    """One sweep over all indices, left to right, each to its best centroid under the true loss with the others fixed.

    pull: (W - Q) H; it is kept up to date, within a block by the kernel, for all other columns by one product per block
    -> (the indices, their (W - Q) H).
    """
    spec, d = problem.spec, problem.spec.dim
    index = index.clone()
    # A dead input would make H_PP singular; its weights then simply follow their neighbours in the vector.
    ridge = 1e-6 * problem.H.diagonal().mean()
    H = problem.H.clone()
    H.diagonal().add_(ridge)
    R = pull.addcmul(problem.W - problem.decode(index, centroids), ridge)
    for first in range(0, spec.vectors, block_cols // d):
        at = slice(first, min(first + block_cols // d, spec.vectors))
        cols = slice(at.start * d, at.stop * d)
        scale = None if problem.scale is None else problem.scale[:, at]
        index[:, at], change = ops.descent_block(
            R[:, cols], H[cols, cols], index[:, at], centroids, problem.strip[at], scale, spec.group_rows)
        ops.submatmul(R, change, H[cols])
    return index, R.addcmul_(problem.W - problem.decode(index, centroids), ridge, value=-1)
