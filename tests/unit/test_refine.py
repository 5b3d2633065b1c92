"""Codebook update and coordinate descent against the full least-squares system, brute force and finite differences."""
import numpy as np
import oracle
import pytest
import torch
from cases import DEGENERATE, GENERIC, Case, ids

from gptvq import refine, solver
from gptvq.config import Recipe, VQConfig
from gptvq.hessian import pad
from gptvq.problem import Problem
from gptvq.spec import QuantSpec


def setting(case, dtype=torch.float64, seed=0):
    """Problem, random codes and centroids, and the oracle's view of tables and scales."""
    W, H = case.build(dtype)
    spec = case.spec
    problem = Problem(W, pad(H, spec.vectors * spec.dim), spec)
    problem.rescale(problem.W, 0, spec.cols)
    draw = torch.Generator().manual_seed(seed)
    index = torch.randint(1 << spec.code_bits, (spec.rows, spec.vectors), generator=draw).to(getattr(torch, spec.code_dtype))
    size = problem.W.square().mean().sqrt() if problem.scale is None else 0.6
    centroids = (torch.randn(spec.row_groups, spec.strips, spec.codewords, spec.dim, generator=draw, dtype=torch.float64)
                 * size).to(dtype)
    scale = np.ones((spec.rows, spec.vectors)) if problem.scale is None else problem.scale.double().numpy()
    return problem, index, centroids, scale


@pytest.mark.parametrize("full, half", [(4, 2), (3, 2), (1, 1)])
def test_codebook_updates_are_whole_at_both_ends(full, half, monkeypatch):
    """The first and the last take all the iterations of the recipe, those between half of them."""
    taken, refit = [], solver._refit
    monkeypatch.setattr(solver, "_refit", lambda *args: taken.append(args[4]) or refit(*args))
    recipe = Recipe(em_iterations=2, em_starts=1, passes=2, sweeps=2, cg_iterations=full)
    solver.solve(torch.randn(16, 32), torch.eye(32), QuantSpec(16, 32, 2, 2, 16, 32), recipe, "weight")
    assert taken == [full, half, half, full]


def tables_of(centroids, spec):
    c = centroids.double().numpy()
    tables = {place: oracle.all_signs(c[place]) if spec.signs else c[place] for place in np.ndindex(c.shape[:2])}
    return [[tables[r // spec.group_rows, v * spec.dim // spec.group_cols] for v in range(spec.vectors)]
            for r in range(spec.rows)]


def error(problem, index, centroids, scale):
    """The oracle's relative layer error."""
    W, H = problem.W.double().numpy(), problem.H.double().numpy()
    Q = oracle.decode(index.numpy(), tables_of(centroids, problem.spec), scale, problem.spec.dim)
    return oracle.loss(W, Q, H) / oracle.loss(W, 0 * W, H)


def sweep(problem, index, centroids, block_cols=16):
    return refine.coordinate_descent(problem, index, centroids, block_cols, problem.measure(index, centroids)[1])


@pytest.mark.parametrize("case", GENERIC, ids=ids)
def test_decode_and_error(case):
    problem, index, centroids, scale = setting(case)
    Q = oracle.decode(index.numpy(), tables_of(centroids, case.spec), scale, case.dim)
    np.testing.assert_allclose(problem.decode(index, centroids).numpy(), Q, atol=1e-12)
    assert problem.error(index, centroids) == pytest.approx(error(problem, index, centroids, scale), rel=1e-9)


@pytest.mark.parametrize("case", GENERIC, ids=ids)
def test_gradient_and_curvature_equal_finite_differences(case):
    """The loss is quadratic, so central differences are exact up to rounding."""
    problem, index, centroids, scale = setting(case)
    gradient = problem.gradient(index, problem.W - problem.decode(index, centroids))
    curvature = problem.curvature(index)
    rng = np.random.default_rng(0)

    def loss(c):
        return error(problem, index, c, scale) * problem.power

    g, s, k = rng.integers(case.spec.row_groups), rng.integers(case.spec.strips), int(index[0, 0]) % case.spec.codewords
    for i in range(case.dim):
        step = torch.zeros_like(centroids)
        step[g, s, k, i] = 0.1
        up, down = loss(centroids + step), loss(centroids - step)
        assert -2 * float(gradient[g, s, k, i]) == pytest.approx((up - down) / 0.2, rel=1e-6, abs=1e-8)

    one = torch.zeros_like(index)               # one vector alone: its diagonal block is all of the curvature
    one[0, 0], k = case.spec.codewords - 1, case.spec.codewords - 1
    H = problem.H[:case.dim, :case.dim].numpy() * scale[0, 0] ** 2
    np.testing.assert_allclose(problem.curvature(one)[0, 0, k].numpy(), H, rtol=1e-12)
    total = sum(np.trace(problem.H.numpy()[v * case.dim:][:case.dim, v * case.dim:][:, :case.dim]) * scale[r, v] ** 2
                for r in range(case.rows) for v in range(case.spec.vectors))
    assert float(curvature.diagonal(dim1=-2, dim2=-1).sum()) == pytest.approx(total, rel=1e-9)


def oracle_update(problem, index, centroids, scale):
    spec, best = problem.spec, centroids.double().clone()
    for g in range(spec.row_groups):
        rows = slice(g * spec.group_rows, (g + 1) * spec.group_rows)
        c = oracle.best_codebooks(problem.W[rows].double().numpy(), problem.H.double().numpy(), index[rows].numpy(),
                                  problem.strip.tolist(), spec.codewords, spec.dim, scale[rows])
        best[g] = torch.from_numpy(c)
    return best


@pytest.mark.parametrize("case", GENERIC, ids=ids)
def test_update_reaches_the_least_squares_optimum(case):
    problem, index, centroids, scale = setting(case)
    index = index % 4                           # enough vectors per centroid for a well-posed system
    want = error(problem, index, oracle_update(problem, index, centroids, scale), scale)
    before = problem.error(index, centroids)
    for iterations, near in ((30, 0.01), (400, 1e-5)):
        got = error(problem, index, refine.update_codebook(problem, index, centroids, iterations), scale)
        assert want - 1e-9 <= got <= want + near * (before - want)
    known = refine.update_codebook(problem, index, centroids, 30, problem.measure(index, centroids)[1])
    torch.testing.assert_close(known, refine.update_codebook(problem, index, centroids, 30))
    single = setting(case, torch.float32)[0]
    got = error(problem, index, refine.update_codebook(single, index, centroids.float(), 400), scale)
    assert got <= want + 1e-3 * (before - want)


@pytest.mark.parametrize("case", GENERIC, ids=ids)
def test_update_finds_exact_centroids_again(case):
    """Weights that a codebook represents exactly: the loss must fall to zero from anywhere."""
    problem, index, centroids, _ = setting(case)
    index = index % 4
    problem.W = problem.decode(index, centroids)
    problem.W[:, case.cols:] = 0
    start = centroids + 0.1 * centroids.std() * torch.randn(centroids.shape, generator=torch.Generator().manual_seed(3))
    assert problem.error(index, refine.update_codebook(problem, index, start, 400)) < 1e-7 * problem.error(index, start)


def test_centroids_without_vectors_keep_their_values():
    problem, index, centroids, _ = setting(GENERIC[3])
    got = refine.update_codebook(problem, index % 5, centroids, 30)
    assert torch.equal(got[:, :, 5:], centroids[:, :, 5:]) and not torch.equal(got[:, :, :5], centroids[:, :, :5])


@pytest.mark.parametrize("case", GENERIC, ids=ids)
def test_sweep_equals_brute_force_over_all_centroids(case):
    problem, index, centroids, scale = setting(case)
    ridge = 1e-6 * problem.H.diagonal().mean() * torch.eye(len(problem.H), dtype=torch.float64)
    want = oracle.coordinate_descent(problem.W.numpy(), (problem.H + ridge).numpy(), index.numpy(),
                                     tables_of(centroids, case.spec), case.dim, scale)
    for block_cols in (8, 128):
        got, pull = sweep(problem, index, centroids, block_cols)
        np.testing.assert_array_equal(got.numpy(), want)
        torch.testing.assert_close(pull, problem.measure(got, centroids)[1])


@pytest.mark.parametrize("dtype, slack", [(torch.float64, 1e-5), (torch.float32, 1e-4)], ids=str)
@pytest.mark.parametrize("case", GENERIC + DEGENERATE, ids=ids)
def test_sweeps_never_raise_the_loss(case, dtype, slack):
    problem, index, centroids, scale = setting(case, dtype)
    errors = [problem.error(index, centroids)]
    for _ in range(3):
        index = sweep(problem, index, centroids)[0]
        assert 0 <= int(index.min()) and int(index.max()) < 1 << case.spec.code_bits
        errors.append(problem.error(index, centroids))
    if problem.power > 0:
        assert all(after <= before * (1 + slack) for before, after in zip(errors, errors[1:]))
        assert errors[-1] < errors[0] or case not in GENERIC


@pytest.mark.parametrize("exponent", [-100, 100])
def test_refinement_does_not_depend_on_the_units_of_the_hessian(exponent):
    for case in GENERIC:
        problem, index, centroids, _ = setting(case, torch.float32)
        scaled = Problem(problem.W[:, :case.cols], problem.H * 2.0 ** exponent, case.spec)
        scaled.scale = problem.scale
        assert torch.equal(sweep(scaled, index, centroids)[0], sweep(problem, index, centroids)[0])
        torch.testing.assert_close(refine.update_codebook(scaled, index, centroids, 20),
                                   refine.update_codebook(problem, index, centroids, 20))


def test_updates_between_the_first_stage_and_the_last_take_half_the_steps(monkeypatch):
    """And those behind the first start from the product that their codes' error took, or that a sweep kept."""
    real, seen = solver.update_codebook, []
    monkeypatch.setattr(solver, "update_codebook", lambda problem, index, centroids, iterations, pull: (
        seen.append((iterations, pull is not None)), real(problem, index, centroids, iterations, pull))[1])
    for recipe, want in ((Recipe(), [(4, False), (2, True), (2, True), (2, True), (4, True)]),
                         (Recipe(passes=1, sweeps=2, cg_iterations=3), [(3, False), (2, True), (3, True)]),
                         (Recipe(passes=1, sweeps=0), [(4, False)])):
        seen.clear()
        solver.solve(*GENERIC[0].build(), GENERIC[0].spec, recipe)
        assert seen == want


def test_adam_is_the_published_update():
    case = GENERIC[6]
    problem, index, centroids, scale = setting(case)

    def gradient(c):
        out = np.zeros(c.shape)
        Q = oracle.decode(index.numpy(), tables_of(torch.from_numpy(c), case.spec), scale, case.dim)
        pull = (problem.W.numpy() - Q) @ problem.H.numpy()
        for r in range(case.rows):
            for v in range(case.spec.vectors):
                at = r // case.group_rows, v * case.dim // case.group_cols, int(index[r, v])
                out[at] -= 2 * scale[r, v] * pull[r, v * case.dim:][:case.dim]
        return out

    got = refine.adam_codebook(problem, index, centroids)
    np.testing.assert_allclose(got.numpy(), oracle.adam(centroids.numpy(), gradient), atol=1e-10)
    assert 0 < (got - centroids).abs().max() <= 25e-3 * 1.5


def test_svd_codebooks_decode_to_what_they_store():
    W, H = Case("svd", 32, 64, 1, 2, 4, 32).build()
    reached = {}
    for rank in (1, 2, 3):
        problem = Problem(W, H, QuantSpec(32, 64, 1, 2, 4, 32, 0, rank))
        centroids = torch.randn(8, 2, 4, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * W.std()
        index = torch.stack([(problem.W[:, v, None] - centroids[problem.group, problem.strip[v], :, 0]).abs().argmin(1)
                             for v in range(64)], 1)
        centroids = refine.update_codebook(problem, index, centroids, 30)
        moved, books = refine.svd_codebook(problem, index, centroids, 30)
        U, V, gs = books.tables["cb_u"].double(), books.tables["cb_v"].double(), books.gs.double()
        torch.testing.assert_close(books.centroids[..., 0], (U @ V).round().clamp(-127, 127) * gs[..., None])
        reached[rank] = problem.error(moved, books.centroids)
        # Untrained: the truncated SVD of the sorted codebooks, each over its largest entry, with nothing rounded.
        table = centroids[..., 0].sort(2).values.flatten(0, 1)
        left, s, right = torch.linalg.svd(table / table.abs().amax(1, keepdim=True), full_matrices=False)
        cut = (left[:, :rank] * s[:rank]) @ right[:rank] * table.abs().amax(1, keepdim=True)
        assert reached[rank] < 0.95 * problem.error(moved, cut.view(8, 2, 4, 1))
    assert reached[1] > reached[2] > reached[3] > 0.999 * problem.error(index, centroids)


def test_absolute_values_stand_for_the_same_weights():
    case = Case("absolute", 12, 32, 4, 3, 6, 16)
    problem, index, centroids, _ = setting(case)
    assert (centroids < 0).any()
    changed, absolute_ones = refine.absolute(problem, index, centroids)
    assert changed.dtype == index.dtype and (absolute_ones >= 0).all() and torch.equal(changed & 255, index & 255)
    assert torch.equal(problem.decode(changed, absolute_ones), problem.decode(index, centroids))


@pytest.mark.parametrize("label", ["2d-2.25-s64", "4d-3.125-s64"])
def test_codes_count_with_the_codebooks_they_were_found_with(label, monkeypatch):
    """One input 300 times the others: rounding to int8 costs more than an update of the codebooks brings."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1024, 256, generator=generator) * torch.exp(0.7 * torch.randn(256, generator=generator))
    x[:, 3] *= 300
    W, seen = 0.02 * torch.randn(128, 256, generator=generator), []

    def descend(problem, index, centroids, *rest):
        found = refine.coordinate_descent(problem, index, centroids, *rest)
        seen.append(problem.error(found[0], centroids))
        return found

    monkeypatch.setattr(solver, "coordinate_descent", descend)
    record = solver.solve(W, 2 / 1024 * x.T @ x, VQConfig.preset(label).spec(128, 256))[1]
    assert len(seen) == 2 and record.error <= min(seen) and record.error == min(record.stages.values())
