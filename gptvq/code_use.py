"""How the codes of a packed checkpoint are used, from its files alone."""
from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import checkpoint, ops
from .backends.reference_packed import centroid_numbers
from .errors import FormatError
from .spec import TILE_ROWS, QuantSpec
from .weight import DTYPES

VECTORS = 1 << 18           # of a layer that are counted: more change nothing that one could see


@dataclass(frozen=True)
class CodeUse:
    """Of one layer: `entropy` of its codes in bits, within each codebook and averaged over the vectors; `bits` stored for each.

    In signed formats the entropy is that of the centroids' numbers and of each sign by itself, added up.  `ranked` [K] are the shares of
    the vectors that take a codebook's most used, second, ... centroid; `unused` is the share of centroids that none takes; `rows` of the
    layer's rows were counted.
    """

    bits: int
    entropy: float
    unused: float
    ranked: list[float]
    rows: int


def code_use(folder: Path) -> dict[str, CodeUse]:
    """{layer: use} of a packed checkpoint folder; reads one layer at a time.  Raises FormatError for damaged files."""
    from safetensors import safe_open

    where = str(folder / checkpoint.CONFIG)
    specs = checkpoint.layer_specs(checkpoint.read_json(folder / checkpoint.CONFIG).get("quantization_config") or {}, where)
    entries = checkpoint.read_headers(checkpoint.tensor_files(folder))
    found = {}
    for name, spec in specs.items():
        entry, part = entries.get(f"{name}.idx"), first_rows(spec)
        shape, dtype = spec.buffer_shapes()["idx"]
        if entry is None or (entry.shape, entry.dtype) != (shape, dtype):
            raise FormatError(f"{folder}: tensor '{name}.idx' is missing or not {dtype} {shape}; copy the files again, or quantize again")
        with safe_open(entry.file, framework="pt") as file:
            idx = file.get_slice(f"{name}.idx")[: part.tiles]
        found[name] = count(ops.unpack_codes(idx.to(DTYPES[dtype]), part), part)
    return found


def first_rows(spec: QuantSpec) -> QuantSpec:
    """The spec of the layer's first rows: all of them, or whole tiles with about VECTORS vectors, at least one."""
    tiles = max(1, VECTORS // (TILE_ROWS * spec.vectors))
    rows = min(spec.rows, tiles * TILE_ROWS)
    return dataclasses.replace(spec, rows=rows, group_rows=min(spec.group_rows, rows))


def count(codes: Tensor, spec: QuantSpec) -> CodeUse:
    """Codes of `spec.code_dtype` [rows, vectors] -> their use."""
    by_row = torch.arange(spec.rows, dtype=torch.int32) // spec.group_rows * spec.strips
    by_column = torch.arange(spec.vectors, dtype=torch.int32) * spec.dim // spec.group_cols
    groups = spec.row_groups * spec.strips
    group = (by_row[:, None] + by_column).flatten()
    taken = torch.bincount(group * spec.codewords + centroid_numbers(codes).flatten(), minlength=groups * spec.codewords).view(groups, -1).float()
    sizes = taken.sum(1, keepdim=True)
    shares = taken / sizes
    weight = (sizes / sizes.sum())[:, 0]
    entropy = torch.special.entr(shares).sum(1) @ weight / math.log(2)
    for i in range(spec.signs):
        negative = (torch.bincount(group, (codes >> 8 + i & 1).flatten().float(), groups) / sizes[:, 0]).float()
        entropy += (torch.special.entr(negative) + torch.special.entr(1 - negative)) @ weight / math.log(2)
    ranked = (shares.sort(1, descending=True).values * weight[:, None]).sum(0)
    return CodeUse(spec.code_bits, float(entropy), float((taken == 0).float().mean()), ranked.tolist(), spec.rows)
