"""Round to nearest: the reference that uses no data.  b-bit integers with a scale and a zero point per group of columns."""
from __future__ import annotations

import torch
from torch import Tensor

GROUPS = (16, 32, 64, 128, 256, 512)


def bits_per_value(cols: int, bits: int, group: int) -> float:
    """Stored bits per weight: the integer, and an fp16 scale and a `bits`-bit zero point per group, the last one ragged."""
    return bits + -(-cols // group) * (16 + bits) / cols


def nearest_group(cols: int, bits: int, target: float) -> int:
    """The group size of GROUPS whose size comes nearest to `target` bits per value.

    4-bit groups of less than 64 are left out: much used sources are themselves 4-bit integers in groups of 32, which such
    groups would reproduce exactly.
    """
    legal = [group for group in GROUPS if bits < 4 or group >= 64]
    return min(legal, key=lambda group: abs(bits_per_value(cols, bits, group) - target))


def grid(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """[rows, cols] -> (scale, zero point) [rows, groups] of a grid from min to max of each `group` columns, zero included."""
    rows, cols = weight.shape
    w = torch.nn.functional.pad(weight.float(), (0, -cols % group)).view(rows, -1, group)     # 0 is inside every range
    low, high = w.amin(2).clamp_max(0), w.amax(2).clamp_min(0)
    top = 2**bits - 1
    scale = ((high - low) / top).clamp_min(2.0**-24).half().float()                           # the least fp16: no division by 0
    return scale, (-low / scale).round().clamp(0, top)


def to_grid(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The nearest points of the grid; all of one shape."""
    return ((weight / scale + zero).round().clamp(0, 2**bits - 1) - zero) * scale


def round_to_nearest(weight: Tensor, bits: int, group: int) -> Tensor:
    """[rows, cols] -> the same, float32, on the grid of each `group` columns of a row."""
    scale, zero = (t.repeat_interleave(group, 1)[:, : weight.shape[1]] for t in grid(weight, bits, group))
    return to_grid(weight.float(), scale, zero, bits)
