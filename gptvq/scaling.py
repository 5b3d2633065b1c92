"""Block scales: one 4-bit logarithmic scale per row and block of columns."""
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .ranks import Rows
    from .spec import QuantSpec


def scale_norm(spec: QuantSpec, method: str) -> int:
    """p of the mean (sum |w|^p / n)^(1/p) of a block that its scale is near; 0 is the largest |w|, as published.

    The few centroids of 2-bit indices are better spent on the bulk of the weights: 2 % less layer error (`bench.tried`), 1 % with the
    signed format. With the other 3-bit and 4-bit ones it is the largest weights that have to stay within reach.
    """
    return 4 if (spec.index_bits == 2 or spec.signs) and method != "paper" else 0


def fit_scales(weight: Tensor, block: int, rows: Rows | None = None, norm: int = 0) -> tuple[Tensor, Tensor]:
    """[rows, cols] -> (codes u8 [rows, blocks], (z, a) f16 [blocks, 2]) with scale 2**(z + a * code) about the norm |w| of a block.

    `norm` is 0, the largest |w|, or 4, the fourth root of the mean of w^4.  z is the least log2 |w| of a block column over the rows, a
    a fifteenth of its range; a block of zeros counts as scale 1 unless its column holds larger ones.  `rows`: of which share of a layer
    the weight is.  Formula: arXiv 2402.15319 section 3.2, "blockwise data normalization", there with the largest |w|.
    """
    least, largest = (rows.least, rows.largest) if rows is not None else (lambda x: x, lambda x: x)
    peak, log = _sizes(weight, block, norm)
    # A zero block follows its column: as an outlier at log2 = 0 it would stretch the range of all other rows.
    log = torch.where(peak > 1e-30, log, least(log.masked_fill(peak <= 1e-30, torch.inf).amin(0)).nan_to_num(posinf=0.0))
    low, high = least(log.amin(0)), largest(log.amax(0))
    sz = torch.stack([low, (high - low) / 15], 1).to(torch.float16)
    z, a = sz.double().unbind(1)
    codes = ((log - z) / a.clamp_min(1e-12)).round().clamp(0, 15)
    return codes.to(torch.uint8), sz


def scale_bounds(weight: Tensor, block: int, norm: int = 0) -> tuple[Tensor, Tensor]:
    """(least, largest) log2 |w| of every block column of [rows, cols], float64 [blocks]; of one of zeros inf and -inf."""
    peak, log = _sizes(weight, block, norm)
    return log.masked_fill(peak <= 1e-30, torch.inf).amin(0), log.masked_fill(peak <= 1e-30, -torch.inf).amax(0)


def _sizes(weight: Tensor, block: int, norm: int) -> tuple[Tensor, Tensor]:
    """max|w| of every block, and the log2 of its norm, 0 for one of zeros: [rows, blocks] each."""
    count, cols = weight.shape
    blocks = -(-cols // block)
    padded = weight.new_zeros(count, blocks * block)
    padded[:, :cols] = weight
    padded = padded.view(count, blocks, block).abs_()
    peak = padded.amax(2)
    size = torch.where(peak > 1e-30, peak, torch.ones_like(peak)).double()
    if norm == 0:
        return peak, size.log2()
    power = padded.div_(size.to(padded.dtype).unsqueeze(2)).square_().square_()
    while power.shape[2] > 1:           # halves added up in one order: the same for any number of rows, threads and devices
        half = power.shape[2] // 2
        power = power[..., :half] + power[..., half:]
    used = torch.tensor([min(block, cols - first) for first in range(0, cols, block)], device=weight.device)
    mean = power[..., 0].double() / used
    return peak, torch.where(peak > 1e-30, size * mean.pow(1 / norm), size).log2()


def scale_table(sz: Tensor) -> Tensor:
    """(z, a) f16 [blocks, 2] -> f32 [blocks, 16]: all scales a block can have.

    2**x is taken in float64 and rounded once, so that every backend and device decodes the same values.
    """
    z, a = sz.double().cpu().unbind(1)
    code = torch.arange(16, dtype=torch.float64)
    return torch.exp2(z[:, None] + a[:, None] * code).float().to(sz.device)


def scales_of(codes: Tensor, sz: Tensor) -> Tensor:
    """codes u8 [rows, blocks] -> f32 [rows, blocks]."""
    return scale_table(sz).gather(1, codes.long().T).T.contiguous()
