"""Arguments of the quantization operators, from the table of layers."""
import torch

from gptvq import solver
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


def rows_alike(index, want):
    """Rows with equal indices: nearly all, since only an exact tie may fall either way (and then moves what follows it)."""
    same = (index == want).all(1)
    assert same.float().mean() >= 0.75
    return same
