"""The published procedure without two defects of its authors' code."""
import pytest
import torch

from bench import mended
from gptvq import ops, solver
from gptvq.config import Recipe, VQConfig
from gptvq.hessian import Hessian


def layer(rows=64, cols=256):
    """Weights, and inputs of very different sizes, a few of them large."""
    torch.manual_seed(0)
    X = torch.randn(2048, cols) * torch.logspace(-1, 1, cols)[torch.randperm(cols)]
    return torch.randn(rows, cols), 2 / len(X) * X.T @ X


def solved(method, preset):
    W, H = layer()
    with mended.solving(method):
        vq, record = solver.solve(W, Hessian.from_matrix(H), VQConfig.preset(preset).spec(*W.shape, ""), Recipe.paper(), "layer")
    assert record.error == pytest.approx(float(((vq.dequantize() - W) @ H * (vq.dequantize() - W)).sum() / (W @ H * W).sum()), rel=1e-3)
    return record.error


def test_em_weights_are_those_of_the_loss():
    U = torch.linalg.cholesky(torch.linalg.inv(layer()[1]), upper=True)
    with mended.solving(mended.METHOD):
        roots, metric = solver.metrics(U, 2, "paper")
    diagonal = U.diagonal().view(-1, 2)
    torch.testing.assert_close(roots, torch.diag_embed(1 / diagonal))
    torch.testing.assert_close(metric, torch.diag_embed(1 / diagonal**2))
    torch.testing.assert_close(solver.metrics(U, 2, "paper")[1], torch.diag_embed(diagonal))        # as before


@pytest.mark.parametrize("preset", ["1d-2.25", "2d-2.25", "2d-2.25-s64", "4d-2.125-s64"])
def test_less_error_than_with_the_defects(preset):
    assert solved(mended.METHOD, preset) < 0.97 * solved("paper", preset)


def test_columns_are_current_with_block_scales(monkeypatch):
    stale = []
    monkeypatch.setattr(ops, "column_block", lambda *args, inner=ops.column_block: (stale.append(args[-2]), inner(*args))[1])
    solved("paper", "2d-2.25-s64")
    assert stale and all(stale)
    stale.clear()
    solved(mended.METHOD, "2d-2.25-s64")
    assert stale and not any(stale)
