"""Block scales: 4-bit codes in the log domain against the formula, and the table that all decoders share."""
import math

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptvq.config import VQConfig
from gptvq.scaling import block_sizes, fit_scales, scale_norm, scale_range, scale_reach, scale_table, scales_of


def draw(rows, cols, seed, spread=1.0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, cols)) * np.exp(spread * rng.standard_normal((rows, 1)))


@pytest.mark.parametrize("norm", [0, 4])
@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("reach", [math.inf, 6.0, 1.0])
@pytest.mark.parametrize("rows, cols", [(1, 64), (7, 64), (16, 100), (5, 7), (33, 129)])
def test_codes_follow_the_formula(rows, cols, block, norm, reach):
    W = draw(rows, cols, rows * cols)
    codes, za = fit_scales(torch.from_numpy(W), block, norm=norm, reach=reach)
    want, want_za = oracle.scales(W, block, norm, reach)
    assert codes.dtype == torch.uint8 and za.dtype == torch.float16
    np.testing.assert_array_equal(za.double().numpy(), want_za)
    matters = za[:, 1].numpy() > 0              # a column of equal scales decodes alike with every code
    np.testing.assert_array_equal(codes.numpy() * matters, want * matters)


def test_table_and_lookup():
    W = torch.from_numpy(draw(12, 80, 3))
    codes, za = fit_scales(W, 32)
    table = scale_table(za)
    for b, (z, a) in enumerate(za.double().tolist()):
        for code in range(16):
            assert float(table[b, code]) == float(np.float32(2.0 ** (z + a * code)))
    scales = scales_of(codes, za)
    assert scales.shape == (12, 3) and scales.dtype == torch.float32
    for r in range(12):
        for b in range(3):
            assert float(scales[r, b]) == float(table[b, int(codes[r, b])])


def test_scales_stay_within_half_a_step_of_the_peak():
    W = draw(64, 256, 4, 2.0)
    codes, za = fit_scales(torch.from_numpy(W), 64, reach=math.inf)
    peak = np.abs(W.reshape(64, 4, 64)).max(2)
    distance = np.abs(np.log2(scales_of(codes, za).numpy()) - np.log2(peak))
    assert (distance <= 0.5 * za[:, 1].double().numpy() + 0.02).all()       # z and a are float16
    assert set(codes.flatten().tolist()) >= {0, 15}


@pytest.mark.parametrize("norm", [0, 4])
def test_blocks_do_not_see_each_other(norm):
    W = torch.from_numpy(draw(6, 96, 5))
    codes, za = fit_scales(W, 32, norm=norm)
    for b in range(3):
        alone, alone_za = fit_scales(W[:, 32 * b:32 * b + 32], 32, norm=norm)
        assert torch.equal(alone[:, 0], codes[:, b]) and torch.equal(alone_za[0], za[b])


@pytest.mark.parametrize("norm", [0, 4])
def test_zero_blocks(norm):
    W = torch.from_numpy(draw(6, 64, 6)) * 1e-3
    W[:, :32], W[2, 32:] = 0, 0
    codes, za = fit_scales(W, 32, norm=norm)
    assert torch.equal(scales_of(codes, za)[:, 0], torch.ones(6))           # a column of zero blocks: scale 1
    others, others_za = fit_scales(W[[0, 1, 3, 4, 5]], 32, norm=norm)                  # one zero block: does not disturb the others
    assert torch.equal(za[1], others_za[1]) and torch.equal(codes[[0, 1, 3, 4, 5], 1], others[:, 1])


@pytest.mark.parametrize("norm", [0, 4])
def test_equal_rows_share_one_scale_exactly_up_to_float16(norm):
    codes, za = fit_scales(torch.full((5, 32), 0.25), 32, norm=norm)
    assert not codes.any() and torch.equal(scales_of(codes, za), torch.full((5, 1), 0.25))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 70), st.sampled_from([16, 32, 64]), st.integers(0, 10_000),
       st.sampled_from([1e-20, 1e-3, 1.0, 1e3, 1e30]), st.sampled_from([torch.float32, torch.float64]), st.sampled_from([0, 4]))
def test_scales_are_finite_and_positive_whatever_the_weights(rows, cols, block, seed, size, dtype, norm):
    W = (torch.from_numpy(draw(rows, cols, seed, 3.0)) * size).to(dtype)
    W[seed % rows] *= seed % 3          # sometimes a row of zeros
    codes, za = fit_scales(W, block, norm=norm)
    scales = scales_of(codes, za)
    assert scales.shape == (rows, -(-cols // block)) and int(codes.max()) <= 15
    assert torch.isfinite(scales).all() and (scales > 0).all()


def test_a_share_of_the_rows_gives_the_same_bytes():
    """What ranks and parts of a head rely on: a row's norm does not depend on the rows beside it."""
    W = torch.from_numpy(draw(301, 200, 8)).float()
    W[5] *= 1e-9
    whole, log = fit_scales(W, 64, norm=4), block_sizes(W, 64, 4)
    for first, last in ((0, 1), (1, 130), (130, 301)):
        class Part:
            scales = scale_range(log, 6.0)

        class Share:
            scales = None
            join = staticmethod(lambda x: log)
        for rows in (Part, Share):
            codes, sz = fit_scales(W[first:last], 64, rows, 4)
            assert torch.equal(sz, whole[1]) and torch.equal(codes, whole[0][first:last])


@pytest.mark.parametrize("norm", [0, 4])
@pytest.mark.parametrize("tiny", [1, 30, 57])
def test_rows_of_nearly_nothing_leave_the_scales_of_all_others_fine(norm, tiny):
    W = torch.from_numpy(draw(64, 128, 9, 0.3))
    W[:tiny] *= 1e-12
    codes, za = fit_scales(W, 64, norm=norm)
    log, wanted = scales_of(codes, za)[tiny:].log2(), block_sizes(W[tiny:], 64, norm)
    assert float((log - wanted).abs().max()) < 0.3 and not codes[:tiny].any()
    as_published, _ = fit_scales(W, 64, norm=norm, reach=scale_reach("paper"))
    assert int(as_published[tiny:].min()) >= 13                                         # three steps for all that matters


def test_small_rows_with_a_purpose_have_scales_of_their_own():
    W = torch.from_numpy(draw(96, 64, 10, 0.2))
    W[64:] /= 16
    assert all(map(torch.equal, fit_scales(W, 64), fit_scales(W, 64, reach=math.inf)))


@pytest.mark.parametrize("preset, method, norm", [
    ("2d-2.25-s64", "gptvq", 4), ("4d-2.125-s64", "gptvq", 4), ("4d-3.125-s64", "gptvq", 4), ("2d-3.125-s64", "gptvq", 0),
    ("1d-4.125-s64", "gptvq", 0), ("2d-2.25-s64", "paper", 0), ("4d-3.125-s64", "paper", 0)])
def test_norm_of_a_format(preset, method, norm):
    assert scale_norm(VQConfig.preset(preset).spec(64, 64), method) == norm
