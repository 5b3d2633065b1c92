"""Block scales: one 4-bit logarithmic scale per row and block of columns."""
from __future__ import annotations

import math
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


def scale_reach(method: str) -> float:
    """Octaves that the scales of a column of blocks go below its typical large block; without end as published.

    A row of nearly nothing would take most of the 16 steps for itself, and leave coarse ones to all the others. Rows that are small but
    mean something, like a third of them for another purpose, do have scales of their own: those down to a 64th. Single rows below have
    coarser codes by it; a loss over all rows hardly sees them.
    """
    return math.inf if method == "paper" else 6.0


def fit_scales(weight: Tensor, block: int, rows: Rows | None = None, norm: int = 0, reach: float = 6.0) -> tuple[Tensor, Tensor]:
    """[rows, cols] -> (codes u8 [rows, blocks], (z, a) f16 [blocks, 2]) with scale 2**(z + a * code) about the norm |w| of a block.

    `norm` is 0, the largest |w|, or 4, the fourth root of the mean of w^4.  z is the least log2 |w| of a block column over the rows, but
    no less than `scale_range` says, a a fifteenth of the range; a block below z has the code 0, and one of zeros too, which counts for
    nothing else; in a column of zeros that is the scale 1.  `rows`: of which share of a layer the weight is.  Formula: arXiv 2402.15319
    section 3.2, "blockwise data normalization", there with the largest |w|, and from the least block on.
    """
    log = block_sizes(weight, block, norm)
    low, high = scale_range(log, reach) if rows is None else rows.scales or scale_range(rows.join(log), reach)
    sz = torch.stack([low, (high - low) / 15], 1).to(torch.float16)
    z, a = sz.double().unbind(1)
    codes = ((log.maximum(low) - z) / a.clamp_min(1e-12)).round().clamp(0, 15)
    return codes.to(torch.uint8), sz


def scale_range(log: Tensor, reach: float) -> tuple[Tensor, Tensor]:
    """`block_sizes` of all rows of a layer -> log2 of (the least, the largest) scale of every block column, float64 [blocks].

    The least is that of a block, but at most `reach` below the block that a tenth of a column is larger than.
    """
    rising = log.sort(0).values                     # blocks of zeros first
    live = (rising > -torch.inf).sum(0)
    least, typical = ((len(log) - count).clamp_max(len(log) - 1) for count in (live, (live + 9) // 10))
    low = rising.gather(0, least[None])[0].maximum(rising.gather(0, typical[None])[0] - reach)
    return tuple(bound.where(live > 0, 0.0) for bound in (low, rising[-1]))


def block_sizes(weight: Tensor, block: int, norm: int) -> Tensor:
    """log2 of the norm of every block of [rows, cols], float64 [rows, blocks]; of one of zeros -inf."""
    count, cols = weight.shape
    blocks = -(-cols // block)
    padded = weight.new_zeros(count, blocks * block)
    padded[:, :cols] = weight
    padded = padded.view(count, blocks, block).abs_()
    peak = padded.amax(2)
    size = torch.where(peak > 1e-30, peak, torch.ones_like(peak)).double()
    if norm == 0:
        return torch.where(peak > 1e-30, size.log2(), -torch.inf)
    power = padded.div_(size.to(padded.dtype).unsqueeze(2)).square_().square_()
    while power.shape[2] > 1:           # halves added up in one order: the same for any number of rows, threads and devices
        half = power.shape[2] // 2
        power = power[..., :half] + power[..., half:]
    used = torch.tensor([min(block, cols - first) for first in range(0, cols, block)], device=weight.device)
    mean = power[..., 0].double() / used
    return torch.where(peak > 1e-30, (size * mean.pow(1 / norm)).log2(), -torch.inf)


def scale_table(sz: Tensor) -> Tensor:
    """(z, a) f16 [blocks, 2] -> f32 [blocks, 16]: all scales a block can have.

    2**x is taken in float64 and rounded once, so that every backend and device decodes the same values.
    """
    z, a = sz.cpu().double().unbind(1)                    # some devices have no float64
    code = torch.arange(16, dtype=torch.float64)
    return torch.exp2(z[:, None] + a[:, None] * code).float().to(sz.device)


def scales_of(codes: Tensor, sz: Tensor) -> Tensor:
    """codes u8 [rows, blocks] -> f32 [rows, blocks]."""
    return scale_table(sz).gather(1, codes.long().T).T.contiguous()
