"""Products of the solver on a GPU, by their arithmetic: TF32 in three parts, and the trailing update in two levels."""
import pytest
import torch
from cases import Case

from gptvq import ops
from gptvq.backends import cuda
from gptvq.config import Recipe
from gptvq.solver import solve


def truncated(t):
    """To TF32 as the worst unit might: the 13 bits cut off."""
    return (t.contiguous().view(torch.int32) & -0x2000).view(torch.float32)


def add_tf32(C, A, B):
    C.copy_(C.double() + truncated(A).double() @ truncated(B).double())


def worst(got, A, B):
    """Largest error, in units of |A| |B|."""
    A, B = A.double(), B.double()
    return float(((got.double() - A @ B).abs() / (A.abs() @ B.abs()).clamp_min(1e-300)).max())


@pytest.mark.parametrize("spread", [0, 6])
@pytest.mark.parametrize("m, k, n", [(1, 1, 1), (7, 33, 70), (64, 512, 130)])
def test_three_tf32_products_are_about_as_good_as_float32(m, k, n, spread, monkeypatch):
    """Rounding of the parts alone: sums are exact here, so float32's own error comes on top of it."""
    monkeypatch.setattr(cuda, "_add_tf32", add_tf32)
    monkeypatch.setattr(cuda, "PANEL_COLS", 48)
    A, B = (torch.randn(shape) * 10 ** (spread * (torch.rand(shape) - 0.5)) for shape in ((k, m), (k, n)))
    A = A.T                                             # strided
    assert worst(cuda.matmul_3xtf32(A, B), A, B) < 2.0 ** -20
    one = torch.zeros(m, n)
    add_tf32(one, A, B)
    assert worst(one, A, B) > 2.0 ** -16 or m * k * n == 1      # which a single one is not
    assert torch.equal(sum(cuda._tf32_parts(A)), A)


@pytest.mark.parametrize("before", ["ieee", "tf32"])
def test_precision_is_what_is_asked_for_and_the_callers_afterwards(before):
    products = torch.backends.cuda.matmul
    callers, products.fp32_precision = products.fp32_precision, before
    try:
        for precision in ("ieee", "tf32"):
            with cuda._products(precision):
                assert products.fp32_precision == precision
            assert products.fp32_precision == before
    finally:
        products.fp32_precision = callers


@pytest.mark.gpu
def test_three_tf32_products_on_a_gpu():
    A, B = torch.randn(300, 4096, device="cuda"), torch.randn(4096, 3000, device="cuda")
    with cuda._products():
        plain = worst(A @ B, A, B)
    assert worst(cuda.matmul_3xtf32(A, B), A, B) < max(4 * plain, 2.0 ** -20)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("order", ["importance", "sequential"])
@pytest.mark.parametrize("lazy, block_cols", [(64, 32), (80, 32), (16, 48), (1024, 32)])
def test_two_levels_give_the_same_codes(device, order, lazy, block_cols, monkeypatch):
    """In float64 all but exact ties; and the same bytes each time."""
    case = Case("ragged", 40, 250, 2, 2, 16, 64)
    W, H = (t.to(device) for t in case.build(torch.float32))
    recipe = Recipe(order=order, em_starts=1, em_iterations=10, passes=2, sweeps=0, block_cols=block_cols, dtype="float64")
    want, ours = solve(W, H, case.spec, recipe)
    calls, submatmul = [], ops.submatmul
    monkeypatch.setattr(ops, "lazy_columns", lambda device, cols: lazy)
    monkeypatch.setattr(ops, "submatmul", lambda C, A, B: (calls.append(tuple(A.shape)), submatmul(C, A, B)))
    got, theirs = solve(W, H, case.spec, recipe)
    assert torch.equal(got.codes(), want.codes()) and abs(theirs.error / ours.error - 1) < 1e-6
    assert any(m == case.rows and k > block_cols for m, k in calls) == (2 * block_cols <= lazy < 250)       # large products there were
    assert solve(W, H, case.spec, recipe)[1].sha256 == theirs.sha256
