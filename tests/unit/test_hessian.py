"""Hessian accumulation, and the factor of its inverse for any Hessian at all."""
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptvq import hessian as hessian_module
from gptvq.errors import NumericalError
from gptvq.hessian import DAMP_STEPS, Hessian, factorize, pad

DAMP = 0.03


def residual(factor, H, damp):
    """Largest entry of U A U^T - 1 for A = H + damp mean(diag H): it is 0 exactly where U^T U = A^-1."""
    U = factor.U.double().numpy()
    return np.abs(U @ oracle.damped(H.double().numpy(), damp) @ U.T - np.eye(len(U))).max()


def inputs(tokens, cols, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_normal((tokens, cols)) @ (np.eye(cols) + 0.5 * np.eye(cols, k=1)) + 0.1).float()


# ---- accumulation

@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-5), (torch.float64, 1e-5)], ids=str)
def test_matrix_is_twice_the_mean_outer_product(dtype, tolerance):
    x = inputs(60, 12).to(dtype)
    hessian = Hessian(12)
    for batch in (x[:7], x[7:31].view(2, 12, 12), x[31:32], x[:0], x[32:]):
        hessian.add(batch)
    want = sum(2 / 60 * np.outer(t, t) for t in x.double().numpy())
    assert hessian.tokens == 60 and hessian.matrix().dtype == torch.float32
    np.testing.assert_allclose(hessian.matrix().numpy(), want, atol=tolerance * np.abs(want).max())
    assert torch.equal(hessian.matrix(), hessian.matrix().T)


def test_how_tokens_are_batched_does_not_matter():
    x, one, many = inputs(64, 8), Hessian(8), Hessian(8)
    one.add(x)
    for t in x:
        many.add(t)
    assert one.tokens == many.tokens
    torch.testing.assert_close(one.matrix(), many.matrix(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_few_non_finite_tokens_are_dropped_and_more_are_an_error(bad, free, monkeypatch):
    monkeypatch.setattr(hessian_module, "looking_is_free", lambda device: free)          # False: as on a GPU
    x, clean, hessian = inputs(1000, 8), Hessian(8), Hessian(8)
    broken = inputs(9, 8, 1)
    broken[3, 5] = bad
    clean.add(x)
    hessian.add(x)
    hessian.add(broken)                     # 9 of 1,009 tokens: the whole batch goes
    assert (hessian.tokens, hessian.dropped) == (1000, 9)
    assert torch.equal(hessian.matrix(), clean.matrix())
    hessian.add(broken)                     # 18 of 1,018
    with pytest.raises(NumericalError, match=r"18 of 1018 .*non-finite"):
        hessian.matrix()


def test_half_precision_overflow_counts_as_non_finite():
    hessian = Hessian(4)
    hessian.add(torch.full((3, 4), 70000.0).half())
    with pytest.raises(NumericalError, match="3 of 3"):
        hessian.matrix()


def test_sums_that_overflow_are_an_error_though_every_input_is_finite():
    hessian = Hessian(4)
    hessian.add(torch.full((3, 4), 1e25))
    with pytest.raises(NumericalError, match="non-finite"):
        hessian.matrix()


def test_no_tokens_give_zeros():
    assert torch.equal(Hessian(5).matrix(), torch.zeros(5, 5))


def test_a_given_matrix_is_symmetrized_and_checked():
    A = torch.from_numpy(np.random.default_rng(0).standard_normal((6, 6)))
    assert torch.equal(Hessian.from_matrix(A).matrix(), (A + A.T) / 2)
    with pytest.raises(NumericalError, match=r"\(6, 5\).*square"):
        Hessian.from_matrix(A[:, :5]).matrix()
    with pytest.raises(NumericalError, match=r"\(6,\)"):
        Hessian.from_matrix(A[0]).matrix()
    with pytest.raises(NumericalError, match="non-finite"):
        Hessian.from_matrix(A.log()).matrix()           # of negative entries: NaN


def test_factor_is_cached_but_not_across_new_tokens():
    hessian, columns = Hessian(8), torch.arange(8)
    hessian.add(inputs(64, 8))
    first = hessian.factor(("sequential", 2), columns, DAMP, torch.float32)
    assert hessian.factor(("sequential", 2), columns, DAMP, torch.float32) is first
    assert hessian.factor(("sequential", 2), columns, 2 * DAMP, torch.float32) is not first
    hessian.add(10 * inputs(64, 8, 1))
    assert residual(hessian.factor(("sequential", 2), columns, DAMP, torch.float32), hessian.matrix(), DAMP) < 1e-4


def test_shrinking_raises_every_input_by_its_own_size():
    hessian, columns = Hessian(8), torch.arange(7, -1, -1)
    hessian.add(inputs(64, 8))
    H = hessian.matrix().double()
    factor = hessian.factor(("x",), columns, DAMP, torch.float64, 0.5)
    assert residual(factor, (H + 0.5 * torch.diag(H.diagonal()))[columns][:, columns], DAMP) < 1e-5
    assert torch.equal(hessian.matrix().double(), H) and hessian.factor(("x",), columns, DAMP, torch.float64) is not factor


def test_factor_follows_the_column_order_and_pads_with_zeros():
    hessian = Hessian(7)
    hessian.add(inputs(64, 7))
    columns = torch.tensor([5, 4, 7, 6, 0, 1, 3, 2])
    factor = hessian.factor(("x",), columns, DAMP, torch.float64)
    H = pad(hessian.matrix(), 8)[columns][:, columns]
    assert H[2].abs().sum() == 0 and residual(factor, H, DAMP) < 1e-9


# ---- factor

@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=str)
@pytest.mark.parametrize("n", [1, 2, 33, 96])
def test_factor_is_the_upper_cholesky_factor_of_the_damped_inverse(n, dtype, tolerance):
    x = inputs(4 * n, n).double()
    H = 2 / len(x) * x.T @ x
    factor = factorize(H, DAMP, dtype)
    want = oracle.factor(oracle.damped(H.numpy(), DAMP))
    assert factor.repair == "" and factor.damp == DAMP and factor.U.dtype == dtype
    np.testing.assert_allclose(factor.U.double().numpy(), want, atol=tolerance * np.abs(want).max())
    assert torch.equal(factor.U, factor.U.triu()) and (factor.U.diagonal() > 0).all()


@pytest.mark.parametrize("exponent", [-100, -31, 0, 31, 100])
def test_factor_does_not_depend_on_the_units_of_the_hessian(exponent):
    x = inputs(40, 24)
    H = x.T @ x
    plain, scaled = factorize(H, DAMP), factorize(H * 2.0 ** exponent, DAMP)
    assert scaled.repair == plain.repair == ""
    torch.testing.assert_close(scaled.U.double() * 2 ** (exponent / 2), plain.U.double(), rtol=1e-6, atol=1e-6)


def test_zeros_are_unweighted_and_say_so():
    factor = factorize(torch.zeros(4, 4), DAMP)
    assert torch.equal(factor.U, torch.eye(4)) and "no calibration data" in factor.repair


def test_large_entries_in_few_digits_do_not_overflow():
    H = torch.tensor([[60000.0, 40000.0], [40000.0, 50000.0]])
    for dtype in (torch.float16, torch.bfloat16):
        given = Hessian.from_matrix(H.to(dtype))
        assert torch.equal(given.matrix(), H.to(dtype).float()) and given.repairs() == []
    assert torch.equal(Hessian.from_matrix(H * 5e33).matrix(), H * 5e33)


def test_the_ladder_damps_an_indefinite_matrix_until_it_works():
    """Eigenvalues down to -0.1 of the mean diagonal: 0.03 and 0.06 cannot do, 0.15 can."""
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((16, 16)))[0]
    values = np.linspace(0.2, 2, 16)
    values[3] = -0.1 * (values.sum() - values[3]) / (16 + 0.1)              # -0.1 of the mean, itself included
    H = torch.from_numpy(rotation * values @ rotation.T)
    factor = factorize(H, DAMP, torch.float32)
    assert (factor.repair, factor.damp) == ("damping x 5", 5 * DAMP)
    assert residual(factor, H, factor.damp) < 1e-4


def test_the_last_rung_is_the_diagonal():
    H = torch.ones(4, 4, dtype=torch.float64) * 50 - 49 * torch.eye(4, dtype=torch.float64)
    H[0, 1] = H[1, 0] = -50
    factor = factorize(H, DAMP, torch.float64)
    assert factor.repair == "diagonal only"
    torch.testing.assert_close(factor.U, torch.diag(torch.full((4,), 1.03, dtype=torch.float64).rsqrt()))


def test_hard_but_definite_matrices_need_at_most_float64():
    """Condition 1e12 before damping, one huge channel: still the asked damping, not more."""
    x = inputs(300, 32).double() * torch.logspace(0, -6, 32, dtype=torch.float64)
    x[:, 7] *= 1e4
    factor = factorize((x.T @ x).float(), 1e-6, torch.float32)
    assert factor.repair in ("", "float64") and factor.damp == 1e-6


@settings(max_examples=80, deadline=None)
@given(n=st.integers(1, 24), tokens=st.integers(0, 40), seed=st.integers(0, 9999), exponent=st.integers(-30, 30),
       duplicates=st.booleans(), dead=st.booleans(), skew=st.floats(0, 0.5),
       dtype=st.sampled_from([torch.float32, torch.float64]))
def test_any_hessian_gives_a_finite_factor_that_is_what_it_says(n, tokens, seed, exponent, duplicates, dead, skew, dtype):
    """Rank 0 to n, duplicated and dead columns, any units, asymmetry."""
    rng = np.random.default_rng(seed)
    x = inputs(tokens, n, seed).double()
    if duplicates:
        x[:, n // 2:] = x[:, : n - n // 2]
    if dead:
        x[:, rng.integers(n, size=n // 3)] = 0
    A = x.T @ x / max(tokens, 1)
    A = A * torch.from_numpy(1 + skew * rng.standard_normal((n, n)) * (1 - np.eye(n))) * 10.0 ** exponent
    H = Hessian.from_matrix(A.float()).matrix()
    factor = factorize(H, DAMP, dtype)
    assert torch.isfinite(factor.U).all() and (factor.U.diagonal() > 0).all()
    if factor.repair.startswith("no calibration"):
        assert not H.any()
    elif factor.repair == "diagonal only":
        assert skew > 0
    else:
        assert factor.damp in [DAMP * step for step in DAMP_STEPS]
        assert residual(factor, H, factor.damp) < 1e-2
        assert skew > 0 or factor.repair in ("", "float64")                 # a true Gram matrix never needs more damping
