"""Plain PyTorch on any device: the semantics of the operators on packed weights."""
from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..spec import BLOCK_COLS, TILE_ROWS, QuantSpec


@functools.lru_cache
def bit_map(code_bits: int, dim: int) -> Tensor:
    """[vectors per block, code_bits, 2]: (byte within a row's bytes, bit) that holds bit t of vector v's code.

    A block is 16 rows x 32 columns of indices, in 64-byte planes; byte 4 r + j of a plane belongs to row r.  A row's
    bytes are numbered 4 plane + j here.
    """
    vectors = BLOCK_COLS // dim
    place = torch.zeros(vectors, code_bits, 2, dtype=torch.long)
    for v in range(vectors):
        for t in range(code_bits):
            if code_bits == 12:                      # the centroid's number; a third plane has a byte for each dimension's signs
                byte, bit = (v, t) if t < 8 else (t, v)
            elif code_bits == 8:                     # one byte per vector
                byte, bit = v, t
            elif code_bits == 4:                     # plane of 8: low nibbles, then high nibbles
                byte, bit = 4 * (v // 8) + v % 4, 4 * (v // 4 % 2) + t
            elif code_bits == 2:                     # plane of 16: four fields of two bits
                byte, bit = 4 * (v // 16) + v % 4, 2 * (v // 4 % 4) + t
            elif code_bits == 6:                     # three planes of four; their top bits hold the last four, high bits first
                byte, bit = (v, t) if v < 12 else (4 * (2 - t // 2) + v % 4, 6 + t % 2)
            elif v < 24:                             # 3 bits: two fields in each of three planes
                byte, bit = 4 * (v // 8) + v % 4, 3 * (v // 4 % 2) + t
            else:                                    # columns 24.. in the top bits of A, 28.. of B, their third bit in C
                half = v // 4 - 6
                byte, bit = (4 * half + v % 4, 6 + t) if t < 2 else (8 + v % 4, 6 + half)
            place[v, t, 0], place[v, t, 1] = byte, bit
    return place


def sign_changes(codes: Tensor, dim: int) -> Tensor | None:
    """int8 1 or -1 for each weight of each vector, [.., dim], by the bits above the lowest 8 of int16 codes; None for codes without."""
    if codes.dtype is not torch.int16:
        return None
    bits = codes.unsqueeze(-1) >> torch.arange(8, 8 + dim, dtype=torch.int16, device=codes.device) & 1
    return 1 - 2 * bits.to(torch.int8)


def centroid_numbers(codes: Tensor) -> Tensor:
    """Which centroid each code takes, long."""
    return codes.long() & 255 if codes.dtype is torch.int16 else codes.long()


def pack_codes(codes: Tensor, spec: QuantSpec) -> Tensor:
    place = bit_map(spec.code_bits, spec.dim)
    per_block, row_bytes = place.shape[0], spec.block_bytes // TILE_ROWS
    padded = codes.new_zeros(spec.tiles * TILE_ROWS, spec.blocks * per_block, dtype=torch.int16)
    padded[: spec.rows, : spec.vectors] = codes
    padded = padded.view(spec.tiles, TILE_ROWS, spec.blocks, per_block)
    out = codes.new_zeros(spec.tiles, TILE_ROWS, spec.blocks, row_bytes, dtype=torch.uint8)
    for v in range(per_block):
        for t, (byte, bit) in enumerate(place[v].tolist()):
            out[..., byte] |= (padded[..., v] >> t & 1).to(torch.uint8) << bit
    # [tile, row, block, plane, j] -> [tile, block, plane, row, j]
    return out.view(spec.tiles, TILE_ROWS, spec.blocks, -1, 4).permute(0, 2, 3, 1, 4).reshape(spec.tiles, spec.blocks, -1)


def unpack_codes(idx: Tensor, spec: QuantSpec) -> Tensor:
    place = bit_map(spec.code_bits, spec.dim)
    rows = idx.view(spec.tiles, spec.blocks, -1, TILE_ROWS, 4).permute(0, 3, 1, 2, 4).reshape(spec.tiles, TILE_ROWS, spec.blocks, -1)
    out = idx.new_zeros(spec.tiles, TILE_ROWS, spec.blocks, place.shape[0], dtype=getattr(torch, spec.code_dtype))
    for v in range(place.shape[0]):
        for t, (byte, bit) in enumerate(place[v].tolist()):
            out[..., v] |= (rows[..., byte] >> bit & 1).to(out.dtype) << t
    return out.view(spec.tiles * TILE_ROWS, -1)[: spec.rows, : spec.vectors].contiguous()


def dequantize(idx: Tensor, cb: Tensor, gs: Tensor, sc: Tensor | None, table: Tensor | None, spec: QuantSpec,
               dtype: torch.dtype) -> Tensor:
    codes = unpack_codes(idx, spec)
    numbers, flips = centroid_numbers(codes), sign_changes(codes, spec.dim)
    row = torch.arange(spec.rows, device=idx.device)[:, None] // spec.group_rows
    col = torch.arange(spec.vectors, device=idx.device)[None] * spec.dim // spec.group_cols
    scale = gs.float()[row, col]
    weight = torch.stack([cb[row, col, i, numbers].float() * scale for i in range(spec.dim)], -1)
    weight = weight if flips is None else weight * flips
    weight = weight.view(spec.rows, -1)[:, : spec.cols]
    if sc is not None:
        from_col = torch.arange(spec.cols, device=idx.device) // spec.scale_block
        byte = sc.permute(0, 2, 1).reshape(spec.tiles * TILE_ROWS, -1)[: spec.rows][:, from_col // 2]
        code = torch.where(from_col % 2 == 0, byte & 15, byte >> 4).long()
        weight = weight * table[from_col, code]
    return weight.to(dtype)


def linear(x: Tensor, idx: Tensor, cb: Tensor, gs: Tensor, sc: Tensor | None, table: Tensor | None, bias: Tensor | None,
           spec: QuantSpec, activations: str) -> Tensor:
    """x [.., cols] -> [.., rows] with the dequantized weight in x's dtype, whatever `activations` says."""
    weight = dequantize(idx, cb, gs, sc, table, spec, x.dtype)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def prepare_linear(*weight):
    return lambda x, activations: linear(x, *weight, activations)
