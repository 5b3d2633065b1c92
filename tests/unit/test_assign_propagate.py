"""Assignment and error propagation against the textbook loop and against solving for the remaining weights outright."""
import numpy as np
import oracle
import pytest
import torch
from cases import GENERIC, Case, ids

from gptvq import solver
from gptvq.backends import reference
from gptvq.config import Recipe
from gptvq.hessian import factorize, pad
from gptvq.problem import Problem

DAMP = 0.03


def setting(case, dtype=torch.float64, seed=0):
    """Problem, centroids fitted to nothing in particular, and the oracle's view of both."""
    W, H = case.build(dtype)
    spec = case.spec
    problem = Problem(W, pad(H, spec.vectors * spec.dim), spec)
    problem.rescale(problem.W, 0, spec.cols)
    size = problem.W.std() if problem.scale is None else 0.6
    draw = torch.Generator().manual_seed(seed)
    centroids = torch.randn(spec.row_groups, spec.strips, spec.codewords, spec.dim, generator=draw, dtype=torch.float64)
    centroids = (centroids * size).to(dtype)
    c = centroids.double().numpy()
    each = {place: oracle.all_signs(c[place]) if spec.signs else c[place] for place in np.ndindex(c.shape[:2])}
    tables = [[each[r // case.group_rows, v * case.dim // case.group_cols] for v in range(spec.vectors)] for r in range(case.rows)]
    scale = np.ones((spec.rows, spec.vectors)) if problem.scale is None else problem.scale.double().numpy()
    return problem, centroids, tables, scale


def run_pass(problem, centroids, order, block_cols, damp=DAMP):
    columns = (order[:, None] * problem.spec.dim + torch.arange(problem.spec.dim)).flatten()
    factor = factorize(problem.H[columns][:, columns], damp, problem.W.dtype)
    assert factor.repair == ""
    recipe = Recipe(block_cols=block_cols, dtype=str(problem.W.dtype)[6:])
    return solver.column_pass(problem, factor, order, recipe, centroids)[0].numpy()


def orders(problem):
    v = problem.spec.vectors
    return {"sequential": torch.arange(v), "shuffled": torch.randperm(v, generator=torch.Generator().manual_seed(1))}


@pytest.mark.parametrize("case", GENERIC, ids=ids)
def test_a_pass_equals_the_textbook_loop_and_explicit_solving(case):
    problem, centroids, tables, scale = setting(case)
    W, A = problem.W.numpy(), oracle.damped(problem.H.numpy(), DAMP)
    for order in orders(problem).values():
        want, Q = oracle.quantize_and_propagate(W, A, tables, order.tolist(), case.dim, scale)
        again, _ = oracle.quantize_and_resolve(W, A, tables, order.tolist(), case.dim, scale)
        np.testing.assert_array_equal(want, again)
        for block_cols in (8, 128):         # the lazy update must not matter
            got = run_pass(problem, centroids, order, block_cols)
            np.testing.assert_array_equal(got, want)
        np.testing.assert_allclose(problem.decode(torch.from_numpy(got), centroids).numpy(), Q, atol=1e-12)


@pytest.mark.parametrize("case", GENERIC, ids=ids)
def test_float32_loses_no_quality(case):
    """Codes may differ where two centroids nearly tie; the layer error may not, beyond 2 %."""
    errors = []
    for dtype in (torch.float64, torch.float32):
        problem, centroids, _, _ = setting(case, dtype)
        index = run_pass(problem, centroids, orders(problem)["shuffled"], 16)
        errors.append(problem.error(torch.from_numpy(index), centroids))
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


@pytest.mark.parametrize("case", GENERIC, ids=ids)
def test_assign_takes_the_nearest_centroid_in_the_metric(case):
    problem, centroids, tables, scale = setting(case)
    rng = np.random.default_rng(2)
    root = rng.standard_normal((case.dim, case.dim)) + 2 * np.eye(case.dim)
    for v in (0, case.spec.vectors - 1):
        x = problem.W.view(case.rows, -1, case.dim)[:, v].numpy() / scale[:, v, None]
        books = reference.all_signs(centroids) if case.spec.signs else centroids
        got = reference.assign(torch.from_numpy(x), torch.from_numpy(root @ root.T), books[:, problem.strip[v]], case.group_rows)
        assert got.tolist() == [oracle.nearest(x[r], tables[r][v], root @ root.T) for r in range(case.rows)]


def test_the_first_of_equal_centroids_wins():
    x = torch.tensor([[0.5, 0.0], [1.0, 1.0], [-2.0, 0.0]])
    centroids = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 1.0], [1.0, 1.0]]])
    assert reference.assign(x, torch.eye(2), centroids, 3).tolist() == [0, 3, 0]


@pytest.mark.parametrize("d", [1, 2, 4])
def test_column_block_returns_the_error_that_later_columns_need(d):
    """W[later] - E U[block, later] must equal the exact optimum of the later columns."""
    case = Case(f"block {d}", 7, 24, d, 2, 4, 12)
    problem, centroids, tables, scale = setting(case)
    A, n = oracle.damped(problem.H.numpy(), DAMP), 12
    U = torch.from_numpy(oracle.factor(A))
    roots = torch.stack([torch.linalg.inv(U[p:p + d, p:p + d]) for p in range(0, n, d)])
    index, E = reference.column_block(problem.W[:, :n], U[:n, :n], roots, centroids, problem.strip[:n // d], None, 4)
    Q = oracle.decode(index.numpy(), tables, scale, d)
    W, inverse = problem.W.numpy(), np.linalg.inv(A[n:, n:])
    want = W[:, n:] + (W[:, :n] - Q) @ A[:n, n:] @ inverse
    np.testing.assert_allclose(W[:, n:] - E.numpy() @ U[:n, n:].numpy(), want, atol=1e-11)


@pytest.mark.parametrize("d", [1, 2, 4])
def test_the_solver_uses_the_exact_metric(d):
    case = Case(f"metric {d}", 4, 24, d, 2, 4, 24)
    A = oracle.damped(case.build()[1].numpy(), DAMP)
    U = oracle.factor(A)
    roots, metric = solver.metrics(torch.from_numpy(U), d, "gptvq")
    for i, want in enumerate(oracle.metrics(U, d)):
        remaining = np.linalg.inv(A[i * d:, i * d:])
        np.testing.assert_allclose(want, np.linalg.inv(remaining[:d, :d]), rtol=1e-9)
        np.testing.assert_allclose(metric[i].numpy(), want, rtol=1e-9)
        np.testing.assert_allclose((roots[i] @ roots[i].T).numpy(), want, rtol=1e-9)


def test_the_paper_uses_diagonals_only():
    U = torch.from_numpy(oracle.factor(oracle.damped(Case("paper", 4, 8, 2, 2, 4, 8).build()[1].numpy(), 0.01)))
    roots, metric = solver.metrics(U, 2, "paper")
    for i in range(4):
        u = U.diagonal()[2 * i:2 * i + 2]
        assert torch.equal(metric[i], torch.diag(u)) and torch.equal(roots[i], torch.diag(1 / u))


def test_operators_leave_their_inputs_alone():
    for case in GENERIC[:4]:
        problem, centroids, _, _ = setting(case)
        before = problem.W.clone(), problem.H.clone(), centroids.clone()
        run_pass(problem, centroids, orders(problem)["shuffled"], 8)
        assert all(torch.equal(a, b) for a, b in zip(before, (problem.W, problem.H, centroids)))
