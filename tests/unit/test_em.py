"""EM, seeding and int8 codebooks against the oracle, operator by operator."""
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptvq import codebook
from gptvq.backends import reference
from gptvq.spec import QuantSpec

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}
DIMS = [(1, 4), (1, 8), (2, 16), (4, 12)]


def cloud(d, n=80, groups=3, seed=0):
    """Points [G, N, d] and full metrics [G, N, d, d], one of them scaled as a block scale of 3 would."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((groups, n, d)) @ (np.eye(d) + 0.5 * rng.standard_normal((d, d)))
    root = rng.standard_normal((groups, n, d, d)) + 1.5 * np.eye(d)
    metric = root @ root.transpose(0, 1, 3, 2) * rng.choice([1.0, 9.0], (groups, n, 1, 1))
    return x, metric


def run_em(x, metric, seeds, iterations, dtype=torch.float64):
    args = (torch.from_numpy(np.array(a)).to(dtype) for a in (x, metric, seeds))
    return reference.em(*args, iterations).double().numpy()


def sorted_rows(c):
    return c[np.lexsort(c.T[::-1])]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("d, k", DIMS)
def test_one_iteration_is_one_e_step_and_one_m_step(d, k, dtype):
    x, metric = cloud(d)
    got = run_em(x, metric, x[:, :k], 1, dtype)
    for g in range(len(x)):
        index = oracle.e_step(x[g], metric[g], x[g, :k])
        assert len(set(index)) == k         # every seed is a point, so none is empty
        want = oracle.m_step(x[g], metric[g], index, x[g, :k])
        np.testing.assert_allclose(sorted_rows(got[g]), sorted_rows(want), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("d, k", DIMS)
def test_whole_em_equals_the_oracle(d, k):
    x, metric = cloud(d, seed=1)
    for iterations in (3, 100):
        got = run_em(x, metric, x[:, :k], iterations)
        for g in range(len(x)):
            want = oracle.em(x[g], metric[g], x[g, :k], iterations)
            np.testing.assert_allclose(sorted_rows(got[g]), sorted_rows(want), atol=1e-9)


@pytest.mark.parametrize("d, k", DIMS)
def test_every_iteration_lowers_the_loss(d, k):
    x, metric = cloud(d, groups=1, seed=2)
    losses = [oracle.em_loss(x[0], metric[0], run_em(x, metric, x[:, :k], n)[0]) for n in (1, 2, 3, 5, 8, 60)]
    assert all(a >= b - 1e-9 for a, b in zip(losses, losses[1:])) and losses[-1] < losses[0]


def test_a_group_does_not_depend_on_its_neighbours():
    """Groups converge after different numbers of iterations and leave the batch one by one."""
    for d, k in DIMS:
        x, metric = cloud(d, groups=5, seed=3)
        together = run_em(x, metric, x[:, :k], 100)
        for g in range(5):
            np.testing.assert_array_equal(together[g], run_em(x[g:g + 1], metric[g:g + 1], x[g:g + 1, :k], 100)[0])


@pytest.mark.parametrize("d, k", DIMS)
def test_points_of_metric_zero_have_no_influence(d, k):
    x, metric = cloud(d, groups=2, seed=4)
    stray = np.concatenate([x, 50 + x[:, :7]], 1)
    zero = np.concatenate([metric, 0 * metric[:, :7]], 1)
    np.testing.assert_allclose(run_em(stray, zero, x[:, :k], 100), run_em(x, metric, x[:, :k], 100), atol=1e-12)


@pytest.mark.parametrize("d, k", DIMS)
def test_an_empty_centroid_goes_to_the_farthest_point(d, k):
    x, metric = cloud(d, groups=1, seed=5)
    seeds = x[:, :k].copy()
    seeds[0, -2:] = 1e3                     # no point is near these two
    got = run_em(x, metric, seeds, 1)[0]
    order = np.argsort(seeds[0, :, 0]) if d == 1 else np.arange(k)
    want = oracle.m_step(x[0], metric[0], oracle.e_step(x[0], metric[0], seeds[0][order]), seeds[0][order])
    np.testing.assert_allclose(sorted_rows(got), sorted_rows(want), atol=1e-9)
    assert np.abs(run_em(x, metric, seeds, 50)).max() < 100


@pytest.mark.parametrize("d, k", DIMS)
def test_fewer_distinct_points_than_centroids_are_met_exactly(d, k):
    x, metric = cloud(d, groups=1, seed=6)
    x = np.tile(x[:, : k // 2], (1, 5, 1))
    metric = metric[:, : x.shape[1]]
    weight = torch.ones(1, x.shape[1], dtype=torch.float64)
    got = reference.em(torch.from_numpy(x), torch.from_numpy(metric), codebook.seed(torch.from_numpy(x), weight, k), 50)
    assert torch.isfinite(got).all()
    assert oracle.em_loss(x[0], metric[0], got[0].numpy()) < 1e-12 * oracle.em_loss(x[0], metric[0], [np.zeros(d)])


@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
@pytest.mark.parametrize("d, k", DIMS)
def test_constant_points_give_constant_centroids(d, k, value):
    x = torch.full((2, 20, d), value, dtype=torch.float32)
    metric = torch.eye(d).expand(2, 20, d, d).contiguous()
    got = reference.em(x, metric, codebook.seed(x, torch.ones(2, 20), k), 10)
    torch.testing.assert_close(got, torch.full_like(got, value))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(DIMS), st.integers(1, 40), st.booleans())
def test_em_on_anything_is_finite_and_no_worse_than_its_seeds(seed, shape, n, rounded):
    d, k = shape
    x, metric = cloud(d, n, 1, seed)
    x = np.round(x) if rounded else x       # many ties and duplicates
    seeds = codebook.seed(torch.from_numpy(x), torch.ones(1, n, dtype=torch.float64), k).numpy()
    got = run_em(x, metric, seeds, 30)
    assert np.isfinite(got).all()
    assert oracle.em_loss(x[0], metric[0], got[0]) <= oracle.em_loss(x[0], metric[0], seeds[0]) * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("d, k", DIMS)
def test_seeds_are_points_at_equal_ranks_of_the_mahalanobis_distance(d, k):
    x, _ = cloud(d, n=61, seed=7)
    weight = np.ones((3, 61))
    weight[1, 40:] = 0                      # padding: takes no part, whatever it holds
    x[1, 40:] = 99.0
    got = codebook.seed(torch.from_numpy(x), torch.from_numpy(weight), k).numpy()
    for g, n in enumerate((61, 40, 61)):
        np.testing.assert_array_equal(got[g], oracle.seed(x[g, :n], k))


@pytest.mark.parametrize("d, k", DIMS)
def test_fit_weighs_points_by_the_square_of_their_scale(d, k):
    """fit(x / s, weight s^2) lays centroids by the error in original units."""
    rng = np.random.default_rng(8)
    x, metric = cloud(d, groups=1, seed=8)
    s = rng.choice([0.25, 1.0, 4.0], x.shape[1])
    got = codebook.fit(*(torch.from_numpy(a) for a in (x, metric[0], (s ** 2)[None])), k, 60)[0].numpy()
    M = metric[0] * (s ** 2)[:, None, None]
    np.testing.assert_allclose(sorted_rows(got), sorted_rows(oracle.em(x[0], M, oracle.seed(x[0], k), 60)), atol=1e-9)


@pytest.mark.parametrize("dim, bits", [(1, 2), (2, 2), (2, 3), (4, 2)])
def test_int8_codebooks(dim, bits):
    spec = QuantSpec(8, 64, dim, bits, 4, 32)
    rng = np.random.default_rng(dim)
    sizes = np.array([[1e-4, 1.0], [300.0, 0.0]])[..., None, None]
    centroids = torch.from_numpy(rng.standard_normal((2, 2, spec.codewords, dim)) * sizes)
    books = codebook.compress(centroids)
    for g in range(2):
        for s in range(2):
            want, scale = oracle.int8(centroids[g, s].numpy())
            assert float(books.gs[g, s]) == scale
            np.testing.assert_array_equal(books.tables["cb"][g, s].T.numpy(), want)
            np.testing.assert_allclose(books.centroids[g, s].numpy(), want * scale, rtol=1e-7)
            assert (books.centroids[g, s] - centroids[g, s]).abs().max() <= scale / 2 * (1 + 1e-6)


def test_the_codebook_scale_wastes_less_than_a_bfloat16_step():
    for peak in (1e-30, 0.0123, 1.0, 127.0, 126.99, 5e4):
        gs = codebook.table_scale(torch.tensor([peak], dtype=torch.float64))
        assert peak / 127 * (1 - 1e-7) <= float(gs) < peak / 127 * (1 + 2 ** -7)
    assert float(codebook.table_scale(torch.zeros(1))) == 1


@pytest.mark.parametrize("d, k", DIMS)
def test_more_starts_find_better_codebooks_and_leave_the_callers_random_numbers_alone(d, k):
    x, metric = (torch.from_numpy(a) for a in cloud(d, groups=6, seed=3))
    weight = torch.ones(x.shape[:2], dtype=x.dtype)
    state = torch.get_rng_state()
    everywhere = metric[:1].expand_as(metric)
    loss = [float(reference.distortion(x, everywhere, codebook.fit(x, metric[0], weight, k, 60, starts)).sum()) for starts in (1, 8, 8)]
    assert loss[1] < loss[0] and loss[1] == loss[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_int8_codebooks_of_absolute_values():
    centroids = torch.rand(2, 1, 256, 4, dtype=torch.float64) * 3
    centroids[0, 0, 5], centroids[1] = 0, 0
    books = codebook.compress(centroids, least=1)
    assert books.tables["cb"].min() == 1 and books.tables["cb"].max() == 127
    assert (books.centroids[0] - centroids[0]).abs().max() <= float(books.gs[0, 0]) * (1 + 1e-6)
    assert not books.gs[1].any() and not books.centroids[1].any()
