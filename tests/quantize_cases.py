"""What the tests of the quantization operators share: their arguments, made by the reference, and checks in float64."""
import os
from unittest import mock

import torch

from gptvq import solver
from gptvq.backends.reference import all_signs
from gptvq.config import Recipe
from gptvq.hessian import factorize, pad
from gptvq.problem import Problem


def inputs(case):
    """A problem with fitted codebooks and the arguments of one block of all its columns."""
    W, H = case.build(torch.float32)
    spec = case.spec
    with mock.patch.dict(os.environ, GPTVQ_BACKEND="reference"):
        problem = Problem(W, pad(H, spec.vectors * spec.dim), spec)
        factor = factorize(problem.H, 0.03)
        recipe = Recipe(order="sequential", em_iterations=5)
        index, centroids = solver.column_pass(problem, factor, torch.arange(spec.vectors), recipe, None)
        roots, metric = solver.metrics(factor.U, spec.dim, "gptvq")
    return problem, factor.U, roots, metric, index, centroids


def rows_alike(index, want):
    """Rows with equal indices: nearly all, since only an exact tie may fall either way (and then moves what follows it)."""
    same = (index == want).all(1)
    assert same.float().mean() >= 0.75
    return same


def _choices(i, target, metric, books, index, tolerance):
    """Asserts that each row's code is nearest to its target up to `tolerance`, and the first of equal centroids; returns those."""
    delta = target[:, None] - books
    distance = ((delta @ metric) * delta).sum(-1)
    chosen = books[torch.arange(len(books)), index[:, i].long()]
    worse = distance.gather(1, index[:, i, None].long())[:, 0] - distance.min(1).values
    reach = (((books @ metric) * books).sum(-1).amax(1) + ((target @ metric) * target).sum(-1)).clamp_min(1e-30)
    assert float((worse / reach).max()) < tolerance, f"vector {i}"
    first = (books == chosen[:, None]).all(-1).int().argmax(1)
    assert torch.equal(first, index[:, i].long()), f"vector {i}: not the first of equals"
    return chosen


def check_column_block(index, E, W, U, roots, centroids, strip, scale, group_rows, stale=False, tolerance=1e-5):
    """Every code is nearest given the codes before it, and E is the error that the formula says: in float64, for all rows."""
    start, left, U, roots, centroids = (t.double() for t in (W, W, U, roots, centroids))
    centroids = all_signs(centroids) if index.dtype == torch.int16 else centroids
    left, (n, d) = left.clone(), roots.shape[:2]
    group = torch.arange(len(W)) // group_rows
    size = torch.ones(len(W), n, dtype=torch.float64) if scale is None else scale.double()
    want = torch.empty_like(left)
    for i in range(n):
        at = slice(i * d, i * d + d)
        target = (start if stale and scale is not None else left)[:, at] / size[:, i, None]
        q = _choices(i, target, roots[i] @ roots[i].T, centroids[group, strip[i]], index, tolerance)
        want[:, at] = (left[:, at] - q * size[:, i, None]) @ roots[i]
        left[:, at.stop:] -= want[:, at] @ U[at, at.stop:]
    torch.testing.assert_close(E.double(), want, rtol=1e-4, atol=2e-5 * float(want.abs().max()) + 1e-7)


def check_descent_block(index, change, before, R, H, centroids, strip, scale, group_rows, tolerance=1e-5):
    """The same for coordinate descent from the codes `before`."""
    R, H, centroids = (t.double() for t in (R, H, centroids))
    centroids = all_signs(centroids) if index.dtype == torch.int16 else centroids
    R, d = R.clone(), centroids.shape[-1]
    group = torch.arange(len(R)) // group_rows
    size = torch.ones(index.shape, dtype=torch.float64) if scale is None else scale.double()
    want = torch.empty_like(R)
    for i in range(index.shape[1]):
        at, books, s = slice(i * d, i * d + d), centroids[group, strip[i]], size[:, i, None]
        q = books[torch.arange(len(R)), before[:, i].long()]
        target = q + torch.linalg.solve(H[at, at], R[:, at].T).T / s
        want[:, at] = (_choices(i, target, H[at, at], books, index, tolerance) - q) * s
        R -= want[:, at] @ H[at]
    torch.testing.assert_close(change.double(), want, rtol=1e-5, atol=1e-6 * float(want.abs().max()) + 1e-9)


def to(machine, *args):
    """`args`, tensors on the machine's device."""
    return [a.to(machine.device) if isinstance(a, torch.Tensor) else a for a in args]


def in_orders(machine, run, names=None):
    """The result of `run`, CPU tensors, which every order of threads must give to the bit."""
    first = None
    for order in machine.orders(*([names] if names else [])):
        result = [t.cpu() for t in run()]
        first = first or result
        assert all(torch.equal(a, b) for a, b in zip(result, first)), order
    return first
