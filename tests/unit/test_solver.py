"""The solver: one pass against the oracle, the published arithmetic, every format, degenerate layers, same bytes, errors."""
import dataclasses
import math

import numpy as np
import oracle
import pytest
import torch
from cases import DEGENERATE, GENERIC, Case, hessian, ids
from hypothesis import given, settings
from hypothesis import strategies as st

import gptvq
from gptvq import solver
from gptvq.config import PRESETS, Recipe, VQConfig
from gptvq.errors import ConfigError, NumericalError
from gptvq.hessian import Hessian, factorize, pad
from gptvq.problem import Problem
from gptvq.solver import quantize_weight, solve
from gptvq.spec import QuantSpec


def layer_error(W, H, Q):
    W, H, Q = (t.double().numpy() for t in (W, H, Q))
    return oracle.loss(W, Q, H) / oracle.loss(W, 0 * W, H)


def checked(W, H, spec, recipe=Recipe(), name="weight"):
    """Solves and checks all that holds for any layer -> (weight, record)."""
    before = W.clone(), H.clone()
    vq, record = solve(W, H, spec, recipe, name)
    assert torch.equal(W, before[0]) and torch.equal(H, before[1])
    assert (vq.spec, record.spec, record.name) == (spec, spec, name)
    assert set(record.stages) == ({"pass 1"} | {f"pass {i + 1}" for i in range(recipe.passes)}
                                  | {f"sweep {i + 1}" for i in range(recipe.sweeps)})
    assert record.error == min(record.stages.values()) and math.isfinite(record.error) and record.error >= 0
    assert int(vq.codes().max()) < 1 << spec.code_bits and vq.nbytes == spec.nbytes == record.nbytes
    Q = vq.dequantize()
    assert Q.shape == W.shape and Q.dtype == torch.float32 and torch.isfinite(Q).all()
    if W.any():
        metric = H if H.any() else torch.eye(len(H))
        assert layer_error(W, metric, Q) == pytest.approx(record.error, rel=2e-3, abs=1e-9)
        assert record.snr_db == pytest.approx(-10 * math.log10(max(record.error, 1e-30)))
    else:
        assert not Q.any() and record.error == 0
    return vq, record


# ---- against the oracle

def shrunk(H, recipe):
    return H + recipe.shrink * torch.diag(H.diagonal())


def run_first_pass(case, recipe):
    W, H = case.build()
    spec = case.spec
    problem = Problem(W, pad(H, spec.vectors * spec.dim), spec, method=recipe.method)
    order = solver._visiting_order(problem, recipe)
    columns = (order[:, None] * spec.dim + torch.arange(spec.dim)).flatten()
    factor = factorize(shrunk(problem.H, recipe)[columns][:, columns], recipe.damp, torch.float64)
    index, centroids = solver.column_pass(problem, factor, order, recipe, None)
    return problem, index, centroids


@pytest.mark.parametrize("order", ["importance", "sequential"])
@pytest.mark.parametrize("case", GENERIC, ids=ids)
def test_first_pass_equals_the_oracle(case, order):
    """Scales, seeding, EM, order, assignment and propagation together, in float64."""
    recipe = Recipe(order=order, em_starts=1, em_iterations=3 if case.dim == 4 else 50, block_cols=16, dtype="float64")
    problem, index, centroids = run_first_pass(case, recipe)
    W, H = case.build()
    want, tables, _, scale = oracle.one_pass(W.numpy(), shrunk(H, recipe).numpy(), case.spec, recipe.damp, recipe.em_iterations, order)
    if problem.scale is not None:
        np.testing.assert_allclose(problem.scale.numpy(), scale, rtol=1e-7)
    Q = problem.decode(index, centroids).numpy()
    np.testing.assert_allclose(Q, oracle.decode(want, tables, scale, case.dim), atol=1e-9)


@pytest.mark.parametrize("case", GENERIC[:8] + GENERIC[-2:], ids=ids)
def test_the_paper_method_equals_the_published_arithmetic(case):
    """EM weights U_jj, diagonals of U elsewhere, left to right, 25 Adam steps, int8: the whole layer in float64."""
    recipe = Recipe.paper(dtype="float64")
    W, H = case.build()
    spec, n = case.spec, case.spec.vectors * case.dim
    index, _, centroids, scale = oracle.one_pass(W.numpy(), H.numpy(), spec, 0.01, 100, "sequential", paper=True)
    padded, H_padded = np.pad(W.numpy(), ((0, 0), (0, n - spec.cols))), np.pad(H.numpy(), (0, n - spec.cols))
    at = [[(r // spec.group_rows, v * case.dim // spec.group_cols) for v in range(spec.vectors)] for r in range(spec.rows)]

    def gradient(c):
        out = np.zeros(c.shape)
        Q = oracle.decode(index, [[c[place] for place in row] for row in at], scale, case.dim)
        pull = (padded - Q) @ H_padded
        for r, v in np.ndindex(index.shape):
            out[at[r][v]][index[r, v]] -= 2 * scale[r, v] * pull[r, v * case.dim:][:case.dim]
        return out

    trained = oracle.adam(centroids, gradient)
    for g, s in np.ndindex(trained.shape[:2]):
        codes, unit = oracle.int8(trained[g, s])
        trained[g, s] = codes * unit
    want = oracle.decode(index, [[trained[place] for place in row] for row in at], scale, case.dim)[:, :spec.cols]
    vq, record = checked(W, H, spec, recipe)
    np.testing.assert_allclose(vq.dequantize().numpy(), want, rtol=1e-6, atol=1e-9)
    assert list(record.stages) == ["pass 1"] and record.damp == 0.01


@pytest.mark.parametrize("case", [c for c in GENERIC if c.dim < 4], ids=ids)
def test_the_first_stage_is_the_pass_with_its_best_int8_codebooks(case):
    """The stage's error lies between the least-squares optimum for its codes and a little more for rounding."""
    recipe = Recipe(em_starts=1, passes=1, sweeps=0, cg_iterations=200, dtype="float64")
    problem, index, centroids = run_first_pass(case, recipe)
    spec, scale = case.spec, np.ones(index.shape) if problem.scale is None else problem.scale.numpy()
    best = 0.0
    for g in range(spec.row_groups):
        rows = slice(g * spec.group_rows, (g + 1) * spec.group_rows)
        c = oracle.best_codebooks(problem.W[rows].numpy(), problem.H.numpy(), index[rows].long().numpy(), problem.strip.tolist(),
                                  spec.codewords, spec.dim, scale[rows])
        tables = [[c[s] for s in problem.strip.tolist()]] * len(index[rows])
        best += oracle.loss(problem.W[rows].numpy(), oracle.decode(index[rows].numpy(), tables, scale[rows], spec.dim),
                            problem.H.numpy())
    error = solve(*case.build(), spec, recipe)[1].error
    assert best / problem.power * (1 - 1e-6) <= error <= best / problem.power * 1.1 + 1e-4


# ---- every format, every kind of layer

@pytest.mark.parametrize("case", GENERIC + DEGENERATE, ids=ids)
def test_every_case(case):
    for recipe in (Recipe(), Recipe.paper()):
        checked(*case.build(torch.float32), case.spec, recipe)


@pytest.mark.parametrize("label", PRESETS)
def test_every_preset(label):
    case = Case(label, 48, 96, 2, 2, 8, 32)
    W, H = case.build(torch.float32)
    spec = VQConfig.preset(label).spec(48, 96)
    vq, record = checked(W, H, spec)
    assert vq.bits_per_value == record.bits_per_value == spec.bits_per_value == 8 * spec.nbytes / (48 * 96)
    assert record.error < {2: 0.25, 3: 0.06, 4: 0.02}[spec.index_bits]


def test_exactly_representable_weights_are_found():
    """Four values per group and no more: nothing is lost but the int8 rounding of the codebook."""
    W, H = Case("levels", 16, 64, 1, 2, 4, 32).build(torch.float32)
    levels = torch.tensor([-1.0, -0.25, 0.125, 0.75])
    W = levels[torch.bucketize(W, torch.tensor([-0.05, 0.0, 0.05]))]
    assert checked(W, H, QuantSpec(16, 64, 1, 2, 4, 32))[1].error < 1e-4


def test_svd_codebooks():
    W, H = Case("svd", 64, 64, 1, 3, 2, 64).build(torch.float32)
    full = checked(W, H, QuantSpec(64, 64, 1, 3, 2, 64))[1].error
    errors = [checked(W, H, QuantSpec(64, 64, 1, 3, 2, 64, 0, rank))[1].error for rank in (1, 4, 7)]
    assert errors[0] > errors[1] and full * 0.9 < errors[1] < 1.6 * full


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["structured", "rank deficient", "one token", "dead inputs", "duplicate columns", "zeros"]),
       st.integers(-30, 30), st.floats(0, 1), st.integers(0, 999), st.integers(1, 20), st.integers(1, 40),
       st.sampled_from([(1, 2, 0), (2, 2, 16), (4, 2, 0)]))
def test_any_hessian_ends_in_a_finite_result_or_a_named_error(kind, exponent, skew, seed, rows, cols, layout):
    """Any rank, units and asymmetry, on any shape; only a matrix that is no Hessian may be refused."""
    rng = np.random.default_rng(seed)
    H = hessian(kind, cols, rng).numpy() * (1 + skew * rng.standard_normal((cols, cols)))
    W = torch.from_numpy(rng.standard_normal((rows, cols))).float()
    dim, bits, scale_block = layout
    H, spec = torch.from_numpy(H * 10.0 ** exponent).float(), QuantSpec(rows, cols, dim, bits, 8, 32, scale_block)
    try:
        record = solve(W, H, spec, name="up")[1]
    except NumericalError as error:
        assert skew > 0 and "up: " in str(error)
        return
    assert math.isfinite(record.error)
    if skew == 0:
        assert record.repair in ("", "float64") if H.any() else "unweighted" in record.repair


# ---- quality

def mean_error(recipe, dim=2, bits=2, scale_block=0):
    total = 0.0
    for seed in range(4):
        W, H = Case(f"quality {seed}", 32, 128, dim, bits, 16, 64).build(torch.float32)
        total += checked(W, H, QuantSpec(32, 128, dim, bits, 16, 64, scale_block), recipe)[1].error / 4
    return total


@pytest.mark.parametrize("dim, bits, scale_block", [(1, 2, 0), (2, 2, 0), (2, 2, 32), (2, 3, 0)])
def test_the_default_beats_the_paper(dim, bits, scale_block):
    paper = mean_error(Recipe.paper(), dim, bits, scale_block)
    assert mean_error(Recipe(), dim, bits, scale_block) < 0.8 * paper
    # With nothing but the exact metric, propagation and codebook update:
    exact = Recipe(order="sequential", damp=0.01, passes=1, sweeps=0, em_iterations=100)
    assert mean_error(exact, dim, bits, scale_block) < 0.97 * paper


def test_passes_and_sweeps_only_help():
    errors = [mean_error(Recipe(passes=p, sweeps=s)) for p, s in ((1, 0), (3, 0), (3, 2))]
    assert errors[0] > errors[1] > errors[2]


def test_float64_finds_no_better_solution():
    assert mean_error(Recipe(dtype="float64")) == pytest.approx(mean_error(Recipe()), rel=0.03)


# ---- reproducibility

@pytest.mark.parametrize("label", ["1d-2.25", "2d-2.25-s64", "4d-2.25"])
def test_same_bytes_whatever_the_threads_and_the_random_state(label):
    W, H = Case("bytes " + label, 64, 256, 2, 2, 8, 32).build(torch.float32)
    spec = VQConfig.preset(label).spec(64, 256)
    threads, digests = torch.get_num_threads(), set()
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            torch.manual_seed(count)
            state = torch.get_rng_state()
            digests.add(solve(W, H, spec, Recipe(em_iterations=4, passes=2, sweeps=1))[1].sha256)
            assert torch.equal(torch.get_rng_state(), state)
    finally:
        torch.set_num_threads(threads)
    assert len(digests) == 1


def test_neither_strides_nor_units_matter():
    case = Case("units", 16, 64, 2, 2, 8, 32)
    W, H = case.build(torch.float32)
    want = solve(W, H, case.spec)[1]
    for other in (W.T.contiguous().T, torch.stack([W, W], 2)[..., 1]):
        assert solve(other, H.T.contiguous().T, case.spec)[1].sha256 == want.sha256
    for exponent in (-100, -20, 20, 100):       # powers of two: nothing rounds differently
        got = solve(W, H * 2.0 ** exponent, case.spec)[1]
        assert (got.sha256, got.stages) == (want.sha256, want.stages)
    for exponent in (-90, 12, 90):
        assert solve(W * 2.0 ** exponent, H, case.spec)[1].stages == want.stages


def test_layers_that_share_a_hessian():
    case = Case("shared", 24, 64, 2, 2, 8, 32)
    x = torch.randn(3, 100, 64, generator=torch.Generator().manual_seed(0))
    shared = Hessian(64)
    shared.add(x)
    for name in ("q", "k"):
        W = Case(name, 24, 64, 2, 2, 8, 32).build(torch.bfloat16)[0]
        record = solve(W, shared, case.spec, name=name)[1]
        assert record.tokens == 300 and record.repair == "" and record.damp == 0.01
        assert record.sha256 == solve(W.float(), shared.matrix(), case.spec)[1].sha256


# ---- interface and errors

def test_quantize_weight_takes_a_spec_a_config_or_a_label():
    W, H = Case("label", 32, 64, 2, 2, 16, 64).build(torch.float32)
    spec = VQConfig.preset("2d-2.25").spec(32, 64)
    results = [gptvq.quantize_weight(W, H, c).dequantize() for c in (spec, VQConfig.preset("2d-2.25"), "2d-2.25")]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    short = VQConfig.preset("2d-2.25", recipe=Recipe(passes=1, sweeps=0, em_iterations=1))
    assert not torch.equal(quantize_weight(W, H, short).dequantize(), results[0])
    with pytest.raises(ConfigError, match=r"\(32,\).*\[rows, cols\]"):
        quantize_weight(W[:, 0], H)
    for weight, hessian, named in ((W, H[:, :31], "Hessian: .* square"), (W, H[0], "Hessian: .* square"), (W + 0j, H, "weight: .* complex"),
                                   (W, H + 0j, "Hessian: .* complex")):
        with pytest.raises(ConfigError, match=named):
            quantize_weight(weight, hessian)
    small = W.to(torch.float8_e4m3fn)
    assert torch.equal(quantize_weight(small, H).dequantize(), quantize_weight(small.float(), H).dequantize())
    with pytest.raises(ConfigError, match="H: got NoneType, need a matrix"):
        quantize_weight(W, None)


def test_repairs_are_on_record():
    W, H = Case("repair", 16, 32, 2, 2, 8, 32).build()
    assert "unweighted" in checked(W, torch.zeros(32, 32), VQConfig().spec(16, 32))[1].repair
    indefinite = H - 0.05 * H.diagonal().mean() * torch.eye(32)
    record = solve(W, indefinite, VQConfig().spec(16, 32), Recipe(damp=0.03, shrink=0))[1]
    assert record.repair == f"damping x {round(record.damp / 0.03)}, by which errors are measured too" and record.damp in (0.06, 0.15)
    values = record.to_dict()
    assert values["repair"] == record.repair and values["spec"] == dataclasses.asdict(record.spec) and values["rows"] == 16
