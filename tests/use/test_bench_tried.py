"""What bench.quality tried: rotations that leave a model as it is, and token weights that are gradients."""
import pytest
import torch

from bench.perplexity import found_linears
from bench.rotation import hadamard, random_hadamard, rotate
from bench.token_weights import loss_gradients, weighted
from gptvq import Recipe, VQConfig, quantize
from gptvq.errors import ConfigError
from gptvq.hf import open_model


@pytest.fixture
def model(my_model):
    model = open_model(my_model, device="cpu", dtype="float32")[0]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    return model


@pytest.mark.parametrize("n", [1, 2, 12, 64, 48, 576])
def test_hadamard(n):
    H = hadamard(n)
    assert H.shape == (n, n) and bool((H.abs() == 1).all()) and torch.equal(H @ H.T, n * torch.eye(n, dtype=H.dtype))
    R = random_hadamard(n, torch.Generator().manual_seed(1))
    assert torch.allclose(R.T @ R, torch.eye(n, dtype=R.dtype), atol=1e-12)


@pytest.mark.parametrize("n", [3, 20, 7 * 12])
def test_widths_without_a_matrix(n):
    with pytest.raises(ConfigError, match=f"width of {n}"):
        hadamard(n)


@pytest.mark.parametrize("residual", [False, True])
def test_a_rotated_model_is_the_same_model(model, residual):
    ids = torch.randint(1, 250, (2, 24))
    before = {name: linear.weight.clone() for name, linear in found_linears(model, ids[0]).items()}
    with torch.no_grad():
        want = model(ids).logits
        got = rotate(model, residual)(ids).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    moved = {name.rpartition(".")[2] for name, linear in found_linears(model, ids[0]).items() if not torch.equal(linear.weight, before[name])}
    assert moved == ({name.rpartition(".")[2] for name in before} if residual else {"v_proj", "o_proj"})
    assert not residual or all(bool((norm == 1).all()) for name, norm in model.named_parameters() if norm.ndim == 1)


def test_gradients_are_those_of_the_loss(model):
    """Against differences: moving one output of one token changes the loss as the gradient says."""
    ids, name = torch.randint(1, 250, (2, 12)), "model.layers.1.self_attn.v_proj"
    found = loss_gradients(model, ids)
    assert {tuple(g.shape) for g in found.values()} == {(2, 12)} and len(found) == 14
    linear, t = model.get_submodule(name).double(), 5
    model.double()
    slopes = []
    for i in range(linear.out_features):
        losses = []
        for step in (1e-2, -1e-2):
            def push(m, args, y, step=step, i=i):
                y = y.clone()
                y[0, t, i] += step
                return y
            handle = linear.register_forward_hook(push)
            with torch.no_grad():
                logits = model(ids[:1]).logits[0, :-1]
            handle.remove()
            losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        slopes.append((losses[0] - losses[1]) / 2e-2)
    assert float(found[name][0, t]) == pytest.approx(float(torch.stack(slopes).square().sum()), rel=1e-2)
    assert all(bool((g[:, -1] < 1e-10).all()) for g in found.values())            # nothing is predicted from the last token


def test_weights_reach_the_solver(my_model):
    """Equal weights change nothing; tokens of weight 0 count as if they were not there."""
    ids = torch.randint(1, 250, (4, 24))
    config = VQConfig.preset("2d-2.25", recipe=Recipe(em_iterations=3, em_starts=1, passes=1, sweeps=0))

    def errors(tokens, gradients):
        dense = open_model(my_model, device="cpu", dtype="float32")[0]
        if gradients is None:
            return [r.error for r in quantize(dense, None, config, calibration=tokens, device="cpu").layers]
        with weighted({name: gradients for name in found_linears(dense, ids[0])}, 0.5):
            return [r.error for r in quantize(dense, None, config, calibration=tokens, device="cpu").layers]

    plain = errors(ids, None)
    assert errors(ids, torch.full((4, 24), 3.0)) == pytest.approx(plain, rel=1e-3)
    assert errors(ids, None) == plain
    first = torch.zeros(4, 24)
    first[:2] = 1
    assert errors(ids, first) == pytest.approx(errors(ids[:2], None), rel=1e-3) and errors(ids, first) != pytest.approx(plain, rel=1e-3)
