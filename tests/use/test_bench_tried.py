"""What bench.quality tried and no recipe uses: rotations that leave a model as it is."""
import pytest
import torch

from bench.perplexity import found_linears
from bench.rotation import hadamard, random_hadamard, rotate
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
