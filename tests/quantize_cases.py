"""What every backend's quantization operators must do on the table of layers, compared with the reference in float32."""
import pytest
import torch
from cases import GENERIC

from gptvq import solver
from gptvq.backends import reference
from gptvq.config import Recipe
from gptvq.hessian import factorize, pad
from gptvq.problem import Problem


def inputs(case):
    """A problem with fitted codebooks and the arguments of one block of all its columns."""
    W, H = case.build(torch.float32)
    spec = case.spec
    problem = Problem(W, pad(H, spec.vectors * spec.dim), spec)
    factor = factorize(problem.H, 0.03)
    index, centroids = solver.column_pass(problem, factor, torch.arange(spec.vectors), Recipe(order="sequential", em_iterations=5), None)
    roots, metric = solver.metrics(factor.U, spec.dim, "gptvq")
    return problem, factor.U, roots, metric, index, centroids


def on(device, *args):
    return [arg.to(device) if isinstance(arg, torch.Tensor) else arg for arg in args]


def both(backend, device, name, *args):
    """What the operator `name` returns, from `backend` on `device` and from the reference, both on the CPU."""
    got, want = getattr(backend, name)(*on(device, *args)), getattr(reference, name)(*args)
    return tuple(on("cpu", *got)) if isinstance(got, tuple) else got.cpu(), want


def rows_alike(index, want):
    """Rows with equal indices: nearly all, since only an exact tie may fall either way (and then moves what follows it)."""
    same = (index == want).all(1)
    assert same.float().mean() >= 0.75
    return same


def check_column_block(backend, case, stale, device="cpu"):
    problem, U, roots, _, _, centroids = inputs(case)
    (index, E), (want_index, want_E) = both(backend, device, "column_block", problem.W, U, roots, centroids, problem.strip, problem.scale,
                                            case.group_rows, stale)
    if case in GENERIC:
        same = rows_alike(index, want_index)
        torch.testing.assert_close(E[same], want_E[same], rtol=1e-3, atol=1e-4 * float(want_E.abs().max()))
    assert int(index.max()) < case.spec.codewords
    assert float(E.square().sum()) == pytest.approx(float(want_E.square().sum()), rel=0.05, abs=1e-6)


def check_descent_block(backend, case, device="cpu"):
    problem, _, _, _, index, centroids = inputs(case)
    H = problem.H + 1e-3 * torch.eye(len(problem.H))
    R = (problem.W - problem.decode(index, centroids)) @ H
    (got, change), (want, want_change) = both(backend, device, "descent_block", R, H, index, centroids, problem.strip, problem.scale,
                                              case.group_rows)
    if case in GENERIC:
        same = rows_alike(got, want)
        torch.testing.assert_close(change[same], want_change[same], rtol=1e-4, atol=1e-5 * float(want_change.abs().max()) + 1e-8)
    before, after = (torch.trace((problem.W - problem.decode(i, centroids)) @ H @ (problem.W - problem.decode(i, centroids)).T)
                     for i in (index, got))
    assert after <= before * (1 + 1e-5) + 1e-6


def check_fit(backend, case, rounds, device="cpu"):
    problem, _, _, metric, _, _ = inputs(case)
    d, k = case.dim, case.spec.codewords
    x = problem.W.reshape(1, -1, d).repeat(2, 1, 1)
    x[1] = x[1].flip(0) * 1.5
    weight = torch.ones(x.shape[:2])
    weight[1, ::3] = 0                          # padding
    weight[0, ::5] = 2.5
    seeds = torch.stack([x[:, torch.linspace(0, x.shape[1] - 1, k).long() // (1 + skip)] for skip in range(len(rounds))])
    got, want = both(backend, device, "fit", x, metric, weight, seeds, rounds)
    double = [t.double() for t in (x, metric.repeat(case.rows, 1, 1) * weight[..., None, None])]
    loss = [reference.distortion(*double, c.double()) for c in (got, want, seeds[0])]
    scale = 1e-5 * reference.distortion(*double, torch.zeros(2, 1, d, dtype=torch.float64)) + 1e-9
    assert (loss[0] <= loss[1] * (1 if rounds == ((1, 1),) else 1.05) + scale).all()
    assert (loss[0] <= loss[2] * (1 + 1e-4) + scale).all() or len(rounds) > 1
    if case in GENERIC and rounds == ((1, 1),):
        torch.testing.assert_close(got[0].sort(0).values, want[0].sort(0).values, rtol=1e-3, atol=1e-5)   # [1] may re-seed at a tie


def check_decode_and_collect(backend, case, tolerance, device="cpu"):
    problem, _, _, _, index, centroids = inputs(case)
    spec = case.spec
    assert torch.equal(*both(backend, device, "decode", index, centroids, problem.strip, problem.scale, spec.group_rows))
    values = torch.randn(spec.rows, spec.vectors, 3, generator=torch.Generator().manual_seed(1))
    got, want = both(backend, device, "collect", index, values, problem.strip, spec.group_rows, (spec.row_groups, spec.strips, spec.codewords))
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
