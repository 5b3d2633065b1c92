"""The compiled quantization operators against the reference, on the shared cases, in float32."""
import pytest
import torch
from cases import DEGENERATE, GENERIC, ids
from quantize_cases import inputs, rows_alike

from gptvq import solver
from gptvq.backends import native, reference
from gptvq.errors import ConfigError
from gptvq.hessian import Hessian

pytestmark = pytest.mark.skipif(not native.serves(torch.device("cpu")), reason="gptvq._C is not built here")


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("case", GENERIC + DEGENERATE, ids=ids)
def test_column_block(case, stale):
    problem, U, roots, _, _, centroids = inputs(case)
    args = problem.W, U, roots, centroids, problem.strip, problem.scale, case.group_rows, stale, case.spec.signs > 0
    (index, E), (want_index, want_E) = native.column_block(*args), reference.column_block(*args)
    if case in GENERIC:
        same = rows_alike(index, want_index)
        torch.testing.assert_close(E[same], want_E[same], rtol=1e-3, atol=1e-4 * float(want_E.abs().max()))
    assert int(index.max()) < 1 << case.spec.code_bits
    assert float(E.square().sum()) == pytest.approx(float(want_E.square().sum()), rel=0.05, abs=1e-6)


@pytest.mark.parametrize("case", GENERIC + DEGENERATE, ids=ids)
def test_descent_block(case):
    problem, _, _, _, index, centroids = inputs(case)
    H = problem.H + 1e-3 * torch.eye(len(problem.H))
    R = (problem.W - problem.decode(index, centroids)) @ H
    args = R, H, index, centroids, problem.strip, problem.scale, case.group_rows
    (got, change), (want, want_change) = native.descent_block(*args), reference.descent_block(*args)
    if case in GENERIC:
        same = rows_alike(got, want)
        torch.testing.assert_close(change[same], want_change[same], rtol=1e-4, atol=1e-5 * float(want_change.abs().max()) + 1e-8)
    before, after = (torch.trace((problem.W - problem.decode(i, centroids)) @ H @ (problem.W - problem.decode(i, centroids)).T)
                     for i in (index, got))
    assert after <= before * (1 + 1e-5) + 1e-6


@pytest.mark.parametrize("case", GENERIC + DEGENERATE, ids=ids)
@pytest.mark.parametrize("rounds", [((1, 1),), ((2, 1),), ((40, 1),), ((2, 2), (3, 1), (20, 1))], ids=str)
def test_fit(case, rounds):
    problem, _, _, metric, _, _ = inputs(case)
    d, k = case.dim, min(case.spec.codewords, problem.W.numel())
    x = problem.W.reshape(1, -1, d).repeat(2, 1, 1)
    x[1] = x[1].flip(0) * 1.5
    weight = torch.ones(x.shape[:2])
    weight[1, ::3] = 0                          # padding
    weight[0, ::5] = 2.5
    seeds = torch.stack([x[:, torch.linspace(0, x.shape[1] - 1, k).long() // (1 + skip)] for skip in range(len(rounds))])
    got, want = native.fit(x, metric, weight, seeds, rounds), reference.fit(x, metric, weight, seeds, rounds)
    double = [t.double() for t in (x, metric.repeat(case.rows, 1, 1) * weight[..., None, None])]
    loss = [reference.distortion(*double, c.double()) for c in (got, want, seeds[0])]
    few = x.shape[1] < 2 * k                    # nearly every point has a centroid to itself: rounding decides which moves first
    scale = (1e-4 if few else 1e-5) * reference.distortion(*double, torch.zeros(2, 1, d, dtype=torch.float64)) + 1e-9
    assert (loss[0] <= loss[1] * (1 if rounds == ((1, 1),) else 1.05) + scale).all()
    assert (loss[0] <= loss[2] * (1 + 1e-4) + scale).all() or len(rounds) > 1
    if case in GENERIC and rounds == ((1, 1),):
        torch.testing.assert_close(got[0].sort(0).values, want[0].sort(0).values, rtol=1e-3, atol=1e-5)   # [1] may re-seed at a tie


@pytest.mark.parametrize("m, k, n", [(1, 1, 1), (8, 192, 48), (9, 193, 49), (97, 50, 17), (100, 385, 200), (3, 4200, 5)])
def test_products(m, k, n):
    """Ragged, strided and transposed operands, several depth blocks; outputs are views into something larger."""
    generator = torch.Generator().manual_seed(m)
    wide = torch.randn(2 * m, 3 * k, generator=generator)
    for A in (wide[::2, ::3], wide[:m, :k].T.contiguous().T):
        B = torch.randn(k, n, generator=generator)
        want = A.double() @ B.double()
        tolerance = {"rtol": 0, "atol": 3e-6 * k ** 0.5 * float(want.abs().max())}
        torch.testing.assert_close(native.matmul(A, B).double(), want, **tolerance)
        C = torch.randn(m, n + 7, generator=generator)
        before = C.clone()
        native.submatmul(C[:, 3: 3 + n], A, B)
        torch.testing.assert_close(C[:, 3: 3 + n].double(), before[:, 3: 3 + n] - want, **tolerance)
        assert torch.equal(C[:, :3], before[:, :3]) and torch.equal(C[:, 3 + n:], before[:, 3 + n:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens, cols", [(1, 1), (5, 47), (300, 100), (2049, 33), (2079, 97), (2500, 130)])
def test_gram_and_cross(tokens, cols, dtype):
    x = torch.randn(tokens, 2 * cols, generator=torch.Generator().manual_seed(cols)).to(dtype)[:, ::2]
    total, want = (torch.full((cols, cols), 0.5, dtype=t) for t in (torch.float32, torch.float64))
    for _ in range(2):
        native.gram(total, x)
        reference.gram(want, x)
    torch.testing.assert_close(total.double().triu(), want.triu(), rtol=0, atol=3e-6 * tokens)
    y = torch.randn(tokens, 33, generator=torch.Generator().manual_seed(tokens))
    for other in (y, y.to(dtype)):
        total, want = (torch.full((33, cols), 0.5, dtype=t) for t in (torch.float32, torch.float64))
        native.cross(total, other, x)
        reference.cross(want, other, x)
        torch.testing.assert_close(total.double(), want, rtol=0, atol=3e-6 * tokens)


def test_products_have_the_same_bits_with_any_number_of_threads():
    x = torch.randn(700, 333, generator=torch.Generator().manual_seed(0))
    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            total = torch.zeros(333, 333)
            native.gram(total, x)
            seen.append((native.matmul(x.T, x), total))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for got in seen for a, b in zip(got, seen[0]))


@pytest.mark.parametrize("case", GENERIC, ids=ids)
def test_decode_and_collect(case):
    problem, _, _, _, index, centroids = inputs(case)
    spec = case.spec
    args = index, centroids, problem.strip, problem.scale, spec.group_rows
    assert torch.equal(native.decode(*args), reference.decode(*args))
    for size in (4, 16) if spec.signs else (3,):
        values = torch.randn(spec.rows, spec.vectors, size, generator=torch.Generator().manual_seed(1))
        args = index, values, problem.strip, spec.group_rows, (spec.row_groups, spec.strips, spec.codewords)
        torch.testing.assert_close(native.collect(*args), reference.collect(*args), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", [GENERIC[3], GENERIC[6], GENERIC[8]], ids=ids)
def test_a_layer_gets_the_same_bytes_with_any_number_of_threads_and_the_reference_error(case, monkeypatch):
    W, H = case.build(torch.float32)
    before = torch.get_num_threads()
    try:
        digests = set()
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            record = solver.solve(W, Hessian.from_matrix(H), case.spec)[1]
            digests.add(record.sha256)
    finally:
        torch.set_num_threads(before)
    assert len(digests) == 1
    monkeypatch.setenv("GPTVQ_BACKEND", "reference")
    assert record.error == pytest.approx(solver.solve(W, Hessian.from_matrix(H), case.spec)[1].error, rel=0.05)


def test_malformed_arguments_are_refused():
    problem, U, roots, metric, index, centroids = inputs(GENERIC[3])
    strip, rows = problem.strip, GENERIC[3].group_rows
    for W, s, g, message in ((problem.W[:, :-2], strip, rows, "W: got"), (problem.W, strip + 1, rows, "strip: got"),
                             (problem.W, strip[:-1], rows, "strip: got"), (problem.W, strip, 1, "cover the rows")):
        with pytest.raises(ConfigError, match=message):
            native.column_block(W, U, roots, centroids, s, None, g)
    with pytest.raises(ConfigError, match="index: got"):
        native.decode(index + 200, centroids, strip, None, rows)
    with pytest.raises(ConfigError, match="index: got"):
        native.descent_block(problem.W, problem.H, index + 100, centroids, strip, None, rows)
    x, weight = problem.W.view(1, -1, 2), torch.ones(1, problem.W.numel() // 2)
    for m, w, r, message in ((metric[:-1], weight, (3, 1), "metric: got"), (metric, weight[:, 1:], (3, 1), "weight: got"),
                             (metric, weight, (0, 1), "rounds: got"), (metric, weight, (3, 0), "rounds: got")):
        with pytest.raises(ConfigError, match=message):
            native.fit(x, m, w, centroids[None, :1, 0], (r,))
    for A, B in ((problem.W[:, 1:], problem.H), (problem.W[0], problem.H)):
        with pytest.raises(ConfigError, match="B: got|need 2 dimensions"):
            native.matmul(A, B)
    with pytest.raises(ConfigError, match="C: "):
        native.submatmul(problem.W.T, problem.H, problem.W.T)
    with pytest.raises(ConfigError, match="values: got"):
        native.collect(index, torch.zeros(3, 4, 5), strip, rows, centroids.shape[:3])
