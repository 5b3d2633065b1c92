"""What bench.quality tried and no recipe uses: rotations that leave a model as it is, other scales and groups."""
import dataclasses

import pytest
import torch
from bench_runs import bench

from bench import layers, runner, tried, variants
from bench.perplexity import found_linears
from bench.rotation import hadamard, random_hadamard, rotate, turn, turned
from gptvq.backends import reference
from gptvq.config import Recipe, VQConfig
from gptvq.errors import ConfigError
from gptvq.hessian import Hessian
from gptvq.hf import open_model
from gptvq.solver import solve


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


def test_turned_inputs_leave_the_model_as_it_is(model):
    ids = torch.randint(1, 250, (2, 24))
    before = model.model.layers[1].mlp.down_proj.weight.clone()
    with torch.no_grad():
        want = model(ids).logits
        got = turn(model)(ids).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    down = model.model.layers[1].mlp.down_proj[1]
    assert bool((down.weight != before).any(0).all()) and "model.layers.1.mlp.down_proj.1" in found_linears(model, ids[0])


# ---- scales and groups done otherwise
@pytest.fixture(scope="module")
def layer():
    generator = torch.Generator().manual_seed(5)
    size = torch.randn(64, 1, generator=generator).exp()
    x = torch.randn(400, 128, generator=generator) @ torch.randn(128, 128, generator=generator)
    return layers.Layer("q_proj", torch.randn(64, 128, generator=generator) * size, {side: Hessian.from_matrix(x.T @ x) for side in layers.SIDES})


def spec_of(layer, preset, **changes):
    return dataclasses.replace(VQConfig.preset(preset).spec(*layer.weight.shape), **changes)


@pytest.mark.parametrize("preset", ["2d-2.25", "2d-2.25-s64", "2d-3.125-s64"])
def test_the_recipe_as_it_is_is_the_solver(layer, preset):
    spec = spec_of(layer, preset)
    vq, _ = solve(layer.weight, layer.hessians["calibration"], spec)
    found = variants.Variant(spec).error(layer, Recipe())
    assert found["calibration"] == pytest.approx(layer.error(vq.dequantize(), "calibration"), rel=1e-4)


def test_the_search_never_makes_a_state_worse(layer):
    class Watched(variants.Search):
        moves = []

        def between(self, best):
            before = best.error
            super().between(best)
            self.moves.append((best.error, before, best.problem.scale.clone()))

    spec = spec_of(layer, "2d-2.25-s64", scale_block=32)
    Watched(spec).error(layer, Recipe())
    assert len(Watched.moves) == Recipe().passes + Recipe().sweeps and all(after <= before * (1 + 1e-5) for after, before, _ in Watched.moves)
    assert Watched.moves[0][0] < Watched.moves[0][1] and not torch.equal(Watched.moves[0][2], Watched.moves[-1][2])


def test_norms_and_rows(layer):
    scaled, plain = spec_of(layer, "2d-2.25-s64"), spec_of(layer, "2d-2.25")
    as_it_is, largest, fourth = (v.error(layer, Recipe())["calibration"] for v in (variants.Variant(scaled), variants.Norm(scaled, 0), variants.Norm(scaled, 4)))
    assert as_it_is == fourth != largest
    rows = variants.RowScales(plain, 1.0)
    assert rows.bits == plain.bits_per_value + 16 / 128
    assert rows.error(layer, Recipe())["calibration"] < 0.8 * variants.Variant(plain).error(layer, Recipe())["calibration"]
    assert variants.tall(plain).spec.group_rows == 64 and tried.VARIANTS["search"](plain) is None


def test_4096_centroids(layer, monkeypatch):
    """Its own pass over the columns is the solver's, where indices do fit a byte; and more centroids leave less error."""
    plain = spec_of(layer, "4d-2.125-s64", scale_block=32)
    with monkeypatch.context() as patch:
        patch.setattr(variants.Wide, "__init__", variants.Variant.__init__)
        found = variants.Wide(plain).error(layer, Recipe())["calibration"]
    assert found == pytest.approx(variants.Variant(plain).error(layer, Recipe())["calibration"], rel=1e-3)
    wide = variants.Wide(spec_of(layer, "2d-3.125-s64"))
    assert wide.spec.group_rows == 64 and wide.bits > 3 + 4096 * 4 * 8 / layer.weight.numel()
    assert wide.error(layer, Recipe(passes=1, sweeps=0, em_iterations=2, em_starts=1))["calibration"] < found


def test_4096_centroids_under_changes_of_sign(layer):
    """Decoding, gradient and curvature are those of a free codebook that holds all signs; the bits are what is stored."""
    spec = spec_of(layer, "2d-3.125-s64")
    signed, wide, stored = variants.Signed(spec), variants.Wide(spec), 2048
    assert signed.stored == stored and signed.bits == pytest.approx(wide.bits - (4096 - stored) * 32 / layer.weight.numel())
    made = signed.problem(layer.weight, layer.hessians["calibration"].matrix())
    generator = torch.Generator().manual_seed(1)
    table, index = torch.randn(1, 1, stored, 4, generator=generator), torch.randint(0, 4096, (64, 32), generator=generator)
    full = signed.all_of(table)
    assert full.shape == (1, 1, 4096, 4) and len({tuple(c) for c in full[0, 0].tolist()}) == 4096
    for c in full[0, 0, [stored, 4095]]:
        assert any(torch.equal(c.abs(), t.abs()) for t in table[0, 0])
    with signed.formats, signed.without_kernels:
        assert torch.equal(made.decode(index, table), reference.decode(index, full, made.strip, made.scale, 64))
        leaf = table.double().requires_grad_()
        Q = reference.decode(index, signed.all_of(leaf), made.strip, made.scale.double(), 64)
        residual = made.W.double() - Q
        loss = ((residual @ made.H.double()) * residual).sum()
        loss.backward()
        torch.testing.assert_close(-2 * made.gradient(index, residual.detach().float()), leaf.grad, rtol=1e-3, atol=1e-3 * float(leaf.grad.abs().max()))
        assert made.curvature(index).shape == (1, 1, stored, 4, 4)
        assert float(made.curvature(index).diagonal(dim1=-2, dim2=-1).sum()) == pytest.approx(
            float(made.H.diagonal().double().sum() * 64), rel=1e-5)
    quick = Recipe(passes=1, sweeps=1, em_iterations=2, em_starts=1)
    assert variants.one_codebook(spec).spec.signs == 4
    for found in (signed.error(layer, quick)["calibration"], variants.one_codebook(spec).error(layer, quick)["calibration"]):
        assert found < variants.Variant(spec).error(layer, Recipe())["calibration"]


def test_inputs_of_down_proj_are_turned(layer):
    """An orthogonal change of inputs: W H W^T and so every error stays; other layers are left as they are."""
    down = layers.Layer("mlp.down_proj", layer.weight, layer.hessians)
    other, made = turned([layer, down], 0)
    assert other is layer
    assert bool((made.weight != down.weight).any(1).all())
    for one in (made, down):
        one.products = {side: one.weight @ H.matrix() @ one.weight.T for side, H in one.hessians.items()}
    for side in layers.SIDES:
        torch.testing.assert_close(made.products[side], down.products[side], rtol=1e-4, atol=1e-4 * float(down.products[side].abs().max()))


def test_a_run_of_bench_tried(my_model, tmp_path, capsys):
    out = tmp_path / "tried.json"
    options = ["--model", my_model, "--calibration", my_model.parent / "calibration.txt", "--heldout", my_model.parent / "test.txt",
               "--samples", "2", "--sequence-length", "64", "--blocks", "1", "--linears", "o_proj,down_proj", "--presets", "2d-2.25,2d-2.25-s64"]
    assert bench(tried, *options, "--json", out) == 0
    rows, printed = runner.load(out)["rows"], capsys.readouterr().out
    rotated = ["down_proj alone", "rotated", "rotated with down_proj"]
    assert [row["variant"] for row in rows] == [
        "as it is", "row scales 0.5", "row scales 1.0", "tall", *rotated, "as it is", "norm 0", "norm 4", "search", *rotated]
    assert rows[7]["error_calibration"] == rows[9]["error_calibration"] and rows[0]["ratio_heldout"] == 1
    assert len({row["error_calibration"] for row in rows if row["preset"] == "2d-2.25"}) == 7
    assert bench(tried, "--table", out) == 0 and capsys.readouterr().out == printed
    assert bench(tried, *options[:-1], "2d-2.25", "--variants", "tall", "--json", out) == 0
    assert [row["variant"] for row in runner.load(out)["rows"]] == ["as it is", "tall"]
    capsys.readouterr()
    assert bench(tried, "--presets", "2d-9") == 1 and "2d-9" in capsys.readouterr().err
    assert bench(tried, "--variants", "tal") == 1 and "tall" in capsys.readouterr().err
