"""Packed weights cut into ranges of rows or columns, as tensor parallelism shares them out; no weight changes its value."""
from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from . import ops
from .errors import ConfigError
from .spec import QuantSpec
from .weight import pack_scale_codes, unpack_scale_codes


def shard_spec(spec: QuantSpec, rows: range, cols: range, name: str = "weight") -> QuantSpec:
    """The format of W[rows, cols].  A cut through a group makes the shard's groups smaller: its parts then hold the same codebook twice.

    Raises ConfigError where a vector or a scale would be cut.
    """
    for what, part, whole in (("rows", rows, spec.rows), ("columns", cols, spec.cols)):
        if not 0 <= part.start < part.stop <= whole or part.step != 1:
            raise ConfigError(f"{name}: got {what} {part.start} to {part.stop}, need a range within {whole}")
    least = math.lcm(spec.dim, spec.scale_block or 1)
    if cols.start % least:
        raise ConfigError(f"{name}: cannot be cut at column {cols.start}, which is no multiple of {least} (a vector or a scale would be cut); "
                          "use a tensor-parallel size that fits")
    return dataclasses.replace(spec, rows=len(rows), cols=len(cols), group_rows=_group(spec.group_rows, rows, 1),
                               group_cols=_group(spec.group_cols, cols, 4))


def _group(group: int, part: range, unit: int) -> int:
    """Size of the groups of a part: its length, in whole units, where it lies in one; else such that none spans two of the whole's."""
    if part.start // group == (part.stop - 1) // group:
        return -(-len(part) // unit) * unit
    return math.gcd(group, part.start)


def shard_buffer(buffer: str, tensor: Tensor, spec: QuantSpec, rows: range, cols: range) -> Tensor:
    """One packed buffer of a weight of format `spec` -> that of W[rows, cols] in the format of `shard_spec`."""
    part = shard_spec(spec, rows, cols)
    if buffer == "idx":
        codes = ops.unpack_codes(tensor, spec)[rows.start:rows.stop, cols.start // spec.dim:-(-cols.stop // spec.dim)]
        return ops.pack_codes(codes.contiguous(), part)
    if buffer in ("cb", "cb_u", "gs"):
        groups = (rows.start + torch.arange(part.row_groups, device=tensor.device) * part.group_rows) // spec.group_rows
        strips = (cols.start + torch.arange(part.strips, device=tensor.device) * part.group_cols) // spec.group_cols
        return tensor[groups[:, None], strips]
    if buffer == "cb_v":
        return tensor.clone()
    first = cols.start // spec.scale_block
    blocks = slice(first, first + part.scale_blocks)
    if buffer == "sz":
        return tensor[blocks].clone()
    return pack_scale_codes(unpack_scale_codes(tensor, spec)[rows.start:rows.stop, blocks], part)
