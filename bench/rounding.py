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


def round_to_nearest(weight: Tensor, bits: int, group: int) -> Tensor:
    """[rows, cols] -> the same, float32, on the grid from min to max of each `group` columns of a row, zero included."""
    rows, cols = weight.shape
    top = 2**bits - 1
    w = torch.nn.functional.pad(weight.float(), (0, -cols % group)).view(rows, -1, group)     # 0 is inside every range
    low, high = w.amin(2, keepdim=True).clamp_max(0), w.amax(2, keepdim=True).clamp_min(0)
    scale = ((high - low) / top).clamp_min(2.0**-24).half().float()                           # the least fp16: no division by 0
    zero = (-low / scale).round().clamp(0, top)
    q = (w / scale + zero).round().clamp(0, top)
    return ((q - zero) * scale).view(rows, -1)[:, :cols]
