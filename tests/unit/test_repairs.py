"""Any Hessian ends in finite weights or a named error, and the record says which repair it took."""
import numpy as np
import pytest
import torch
from cases import Case
from hypothesis import given, settings
from hypothesis import strategies as st

from gptvq.config import Recipe, VQConfig
from gptvq.errors import ConfigError, GptvqError, NumericalError
from gptvq.head import solve_parts
from gptvq.hessian import Hessian, borrow
from gptvq.problem import Problem, weight_loss
from gptvq.ranks import Rows
from gptvq.solver import fit_strip, solve
from gptvq.spec import QuantSpec

QUICK = Recipe(em_iterations=3, em_starts=1, passes=2, sweeps=1, cg_iterations=2)
PAPER = Recipe.paper(em_iterations=3)


def spec(rows, cols, **changes):
    return VQConfig(**{"dim": 2, "index_bits": 2, "group_size": 128, **changes}).spec(rows, cols)


def checked(weight, hessian, spec, recipe=QUICK):
    """solve(), whose result is finite and whose error is that of the weights it gives."""
    vq, record = solve(weight, hessian, spec, recipe, "layer")
    assert torch.isfinite(vq.dequantize()).all() and record.error >= 0 and np.isfinite(record.error)
    return vq, record


@settings(max_examples=60)
@given(cols=st.integers(1, 24), tokens=st.integers(0, 40), rank=st.integers(0, 24), seed=st.integers(0, 9999),
       exponent=st.integers(-30, 30), duplicates=st.booleans(), dead=st.booleans(), skew=st.sampled_from([0, 0, 0.3]),
       bad=st.sampled_from([None, "nan", "inf", "-inf"]),
       batches=st.sampled_from([1, 200]), recipe=st.sampled_from([QUICK, PAPER]),
       changes=st.sampled_from([{}, {"scale_block": 16}, {"dim": 1, "svd_rank": 2}, {"dim": 4}]))
def test_any_inputs_end_in_finite_weights_or_a_named_error(cols, tokens, rank, seed, exponent, duplicates, dead, skew, bad, batches, recipe,
                                                           changes):
    """Rank 0 to full, fewer tokens than columns, duplicated and dead columns, units of 1e+-30, asymmetry, a batch that is not finite."""
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.standard_normal((tokens, rank)) @ rng.standard_normal((rank, cols)))
    if duplicates:
        x[:, cols // 2:] = x[:, : cols - cols // 2]
    gone = rng.integers(cols, size=cols // 3) if dead else []
    x[:, gone] = 0
    x = (x * 10.0 ** (exponent / 2)).float()
    hessian = Hessian(cols)
    for _ in range(batches):
        hessian.add(x)
    if bad:
        hessian.add(torch.full((1, cols), float(bad)))
    weight = torch.from_numpy(rng.standard_normal((20, cols))).float()
    if bad and 1 > 0.01 * (batches * tokens + 1):
        with pytest.raises(NumericalError, match=f"layer: 1 of {batches * tokens + 1} calibration tokens gave non-finite activations"):
            solve(weight, hessian, spec(20, cols, **changes), recipe, "layer")
        return
    if skew:
        matrix = hessian.matrix()
        hessian = Hessian.from_matrix(matrix * torch.from_numpy(1 + skew * rng.standard_normal((cols, cols))).float(), hessian.tokens)
    record = checked(weight, hessian, spec(20, cols, **changes), recipe)[1]
    assert ("1 of" in record.repair) == (bad is not None and not skew)
    assert record.dropped == (0 if skew else int(bad is not None))
    if not skew:
        assert record.dead >= len(set(gone)) and record.tokens == batches * tokens
        assert ("unweighted" in record.repair) == (not hessian.matrix().any())
        assert not any(word in record.repair for word in ("damping", "diagonal", "symmetrized"))      # a true Gram matrix needs none


@settings(max_examples=40)
@given(rows=st.integers(1, 20), cols=st.integers(1, 20), seed=st.integers(0, 999), exponent=st.integers(-38, 38), scaled=st.booleans())
def test_weights_of_any_size(rows, cols, seed, exponent, scaled):
    """From below the smallest normal float32 to nearly the largest: a finite result, or an error that names the layer."""
    rng = np.random.default_rng(seed)
    weight = torch.from_numpy(rng.standard_normal((rows, cols)) * 10.0 ** exponent).float().clamp(-3e38, 3e38)
    x = torch.from_numpy(rng.standard_normal((64, cols))).float()
    try:
        checked(weight, 2 / 64 * x.T @ x, spec(rows, cols, scale_block=16 if scaled else 0))
    except NumericalError as error:
        assert str(error).startswith("layer: ") and exponent > 35


@pytest.mark.parametrize("factor", [1e-29, 1e-20, 1e20, 1e35])
@pytest.mark.parametrize("label", ["2d-2.25", "2d-2.25-s64", "4d-3.125-s64"])
def test_far_from_usual_weights_are_solved_as_well_as_any(label, factor):
    generator = torch.Generator().manual_seed(4)
    weight, x = torch.randn(64, 64, generator=generator), torch.randn(300, 64, generator=generator)
    hessian, spec = 2 / 300 * x.T @ x, VQConfig.preset(label).spec(64, 64)
    far = weight * factor
    for solver in (solve, lambda *arguments: solve_parts(*arguments, most=16 * 64, device=torch.device("cpu"))):
        want = solver(weight, Hessian.from_matrix(hessian), spec, QUICK, "layer")[1].error
        vq, record = solver(far, Hessian.from_matrix(hessian), spec, QUICK, "layer")
        assert record.error == pytest.approx(want, rel=0.1)
        lost = far.double() - vq.dequantize().double()
        relative = ((lost @ hessian.double()) * lost).sum() / ((far.double() @ hessian.double()) * far.double()).sum()
        assert float(relative) == pytest.approx(record.error, rel=1e-3)
    with pytest.raises(NumericalError, match="layer: got weights up to"):
        solve(weight * 1e37, hessian, spec, QUICK, "layer")


@pytest.mark.parametrize("label", ["2d-2.25", "2d-2.25-s64"])
def test_float8_weights_in_parts(label):
    weight, target = torch.randn(64, 64).to(torch.float8_e4m3fn), VQConfig.preset(label).spec(64, 64)
    made = [solve_parts(given, Hessian.from_matrix(torch.eye(64)), target, QUICK, "layer", 16 * 64, torch.device("cpu"))[0]
            for given in (weight, weight.float())]
    assert torch.equal(made[0].dequantize(), made[1].dequantize())


def test_row_groups_of_tiny_scales_have_codebooks_like_all_others():
    """As published block scales go down without end, and the squares of these are no float32."""
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(5))
    target, usual = QuantSpec(32, 64, 2, 2, 16, 64, 32), []
    for factor in (1.0, 1e-26):
        weight[:16] *= factor
        problem = Problem(weight, torch.eye(64), target, method="paper")
        problem.rescale(weight, 0, 64)
        centroids = torch.zeros(2, 1, 16, 2)
        fit_strip(problem, centroids, 0, weight, torch.eye(2).expand(32, 2, 2), Recipe(em_starts=4))
        x = weight.view(32, 32, 2) / problem.scale.unsqueeze(-1)
        nearest = (x[:16, :, None, :] - centroids[0, 0]).square().sum(-1).amin(-1)
        usual.append(float(nearest.sum() / x[:16].square().sum()))
    assert usual[1] < 2 * usual[0] < 0.2


def test_weights_of_inputs_that_never_come():
    """No output depends on them: the error is that of the weights, all of which count the same."""
    weight, hessian = torch.zeros(32, 32), torch.zeros(32, 32)
    weight[:, 1::2] = torch.randn(32, 16, generator=torch.Generator().manual_seed(6))
    hessian[::2, ::2] = torch.eye(16)
    vq, record = checked(weight, hessian, VQConfig.preset("4d-3.125").spec(32, 32))        # none of whose entries is 0
    assert record.error < 1 and vq.dequantize().any()


def test_the_loss_of_many_rows_does_not_depend_on_threads():
    weight = torch.randn(70_000, 4, generator=torch.Generator().manual_seed(7))
    threads, found = torch.get_num_threads(), set()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.add(float(weight_loss(weight, torch.eye(4), Rows(spec(70_000, 4)))))
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1


def test_what_was_repaired_is_on_record():
    x = torch.randn(400, 16)
    weight, target = torch.randn(16, 16), spec(16, 16)

    def hessian(*batches):
        found = Hessian(16)
        for batch in batches:
            found.add(batch)
        return found

    assert checked(weight, hessian(x), target)[1].repair == ""
    bad = x[:3].clone()
    bad[1, 1] = float("nan")
    record = checked(weight, hessian(x, bad), target)[1]
    assert record.repair == "3 of 403 tokens dropped: not finite" and (record.dropped, record.tokens) == (3, 400)
    dead = x.clone()
    dead[:, [3, 7]] = 0
    record = checked(weight, hessian(dead), target)[1]
    assert (record.dead, record.repair) == (2, "")
    assert checked(weight, hessian(), target)[1].repair == "no calibration data: unweighted"
    assert checked(weight, hessian(x * 1e-30), target)[1].repair == "inputs of zeros: unweighted"
    matrix = hessian(x).matrix()
    matrix[2, 3] *= 1.5
    assert checked(weight, matrix, target)[1].repair == "symmetrized"
    indefinite = hessian(x, bad)
    indefinite.sum[0, 1] = 30 * indefinite.sum[0, 0]
    assert checked(weight, indefinite, target)[1].repair == "3 of 403 tokens dropped: not finite; diagonal only, by which errors are measured too"
    slightly = hessian(x).matrix()
    slightly -= (torch.linalg.eigvalsh(slightly)[0] + 0.1 * slightly.diagonal().mean()) * torch.eye(16)
    record = checked(weight, slightly, target)[1]
    assert record.repair == f"damping x {round(record.damp / QUICK.damp)}, by which errors are measured too" and record.damp > QUICK.damp
    assert checked(weight, -hessian(x).matrix(), target)[1].repair == "nothing positive on its diagonal: unweighted"
    with pytest.raises(NumericalError, match="layer: Hessian: got non-finite entries"):
        solve(weight, hessian(x * 1e30), target, QUICK, "layer")


# ---- experts with few tokens

def expert(tokens, seed):
    """A Hessian of `tokens` inputs that have much in common with those of other seeds."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 16, generator=generator) * torch.linspace(0.1, 3, 16) + torch.randn(16, generator=generator) * 0.3
    hessian = Hessian(16)
    hessian.add(x)
    return hessian, x


def test_experts_with_few_tokens_borrow_the_rest():
    (rich, a), (poor, b), (idle, _) = expert(100, 1), expert(5, 2), expert(0, 3)
    before = rich.matrix().clone()
    pooled = torch.cat([a, b])
    mean = pooled.T @ pooled / 105
    borrow([rich, poor, idle])
    borrow([rich, poor, idle])                              # once is enough
    assert torch.equal(rich.matrix(), before) and rich.borrowed == 0
    torch.testing.assert_close(poor.matrix(), 2 * (b.T @ b + 59 * mean) / 64)
    torch.testing.assert_close(idle.matrix(), 2 * mean)
    assert (poor.tokens, poor.borrowed, idle.tokens, idle.borrowed) == (5, 59, 0, 64)
    assert poor.repairs() == ["5 tokens: 92% from other experts"] and idle.repairs() == ["0 tokens: 100% from other experts"]


def test_borrowing_helps_on_other_tokens_of_the_expert():
    weight, errors = torch.randn(32, 16), {}
    for seed in range(5):
        test = expert(2000, 100 + seed)[1]
        for borrowing in (False, True):
            rich, poor = expert(500, seed)[0], expert(3, 100 + seed)[0]
            if borrowing:
                borrow([rich, poor])
            difference = weight - checked(weight, poor, spec(32, 16))[0].dequantize()
            errors.setdefault(borrowing, []).append(float((test @ difference.T).square().mean()))
    assert np.mean(errors[True]) < 0.9 * np.mean(errors[False])


def test_without_any_tokens_experts_are_solved_unweighted():
    hessians = [expert(0, seed)[0] for seed in range(3)]
    borrow(hessians)
    assert checked(torch.randn(16, 16), hessians[0], spec(16, 16))[1].repair == "no calibration data: unweighted"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_non_finite_weights_name_the_layer(bad, dtype):
    W, H = Case("bad", 8, 32, 2, 2, 8, 32).build(torch.float32)
    W = W.to(dtype)
    W[3, 7] = W[4, 4] = bad
    with pytest.raises(NumericalError, match=r"model\.3\.down: .*2 non-finite"):
        solve(W, H, VQConfig().spec(8, 32), name="model.3.down")


def test_unusable_hessians_and_shapes_name_the_layer():
    W, H = Case("bad", 8, 32, 2, 2, 8, 32).build(torch.float32)
    spec, nan = VQConfig().spec(8, 32), H.clone()
    nan[0, 1] = torch.nan
    for hessian, named in ((H[:, :31], r"\(32, 31\)"), (H[:31, :31], r"\(31, 31\).* 32 columns"), (H[0], r"\(32,\)"),
                           (torch.stack([H, H]), r"\(2, 32, 32\)"), (nan, "non-finite"), (Hessian(16), r"\(16, 16\).* 32")):
        with pytest.raises(GptvqError, match="up_proj: .*" + named):
            solve(W, hessian, spec, name="up_proj")
    with pytest.raises(ConfigError, match=r"up_proj: .*\(8, 32\).*\(9, 32\)"):
        solve(W, H, VQConfig().spec(9, 32), name="up_proj")
