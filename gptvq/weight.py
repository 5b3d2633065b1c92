"""VQWeight: one vector-quantized weight in its packed form, the same on disk, in memory and in the kernels."""
from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from .codebook import expand
from .errors import FormatError
from .scaling import scale_table
from .spec import QuantSpec

DTYPES = {"uint8": torch.uint8, "int8": torch.int8, "float16": torch.float16, "bfloat16": torch.bfloat16}
SCALES = ("gs", "cb_v", "sz")           # the buffers whose values can be none; any value of the others is one, but see `judged`


class VQWeight:
    """Packed codes, int8 codebooks, codebook scales and block scales of one [rows, cols] weight.

    W[i, j] = gs[g] * cb[g, j mod dim, code(i, j // dim)] * s(i, j // scale_block), g the group of (i, j), computed in
    float32 in this order; s is 1 without block scales.  In signed formats code() is the lower 8 bits of a code, and where bit
    8 + j mod dim is set W[i, j] is negative.  Buffers (`spec.buffer_shapes()`):
    idx u8 [tiles, blocks, bytes]: indices of 16 rows x 32 columns, in the order of `backends.reference.bit_map`;
    cb s8 [row groups, strips, dim, K]; gs bf16 [row groups, strips]; sc u8 [tiles, ceil(scale blocks / 2), 16]: 4-bit
    scale codes, low nibble the even block; sz f16 [scale blocks, 2]: (z, a) with s = 2**(z + a * code).
    With `svd_rank`, cb_u s8 [row groups, strips, rank] and cb_v f16 [rank, K] replace cb = clip(round(cb_u @ cb_v)).
    """

    def __init__(self, spec: QuantSpec, buffers: dict[str, Tensor]):
        check_buffers(spec, buffers)
        self.spec = spec
        self.buffers = {name: buffers[name] for name in spec.buffer_shapes()}

    @classmethod
    def from_parts(cls, spec: QuantSpec, codes: Tensor, tables: dict[str, Tensor], gs: Tensor,
                   scale_codes: Tensor | None = None, sz: Tensor | None = None) -> VQWeight:
        """Codes of `spec.code_dtype` [rows, vectors], tables {"cb"} or {"cb_u", "cb_v"}, scale_codes u8 [rows, scale blocks] -> packed."""
        buffers = {"idx": ops.pack_codes(codes, spec), **tables, "gs": gs.to(torch.bfloat16)}
        if spec.scale_block:
            buffers["sc"] = pack_scale_codes(scale_codes, spec)
            buffers["sz"] = sz.to(torch.float16)
        return cls(spec, buffers)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed buffers, exactly what a checkpoint stores."""
        return sum(t.numel() * t.element_size() for t in self.buffers.values())

    @property
    def bits_per_value(self) -> float:
        return 8 * self.nbytes / (self.spec.rows * self.spec.cols)

    def codes(self) -> Tensor:
        """Codes of `spec.code_dtype` [rows, vectors]."""
        return ops.unpack_codes(self.buffers["idx"], self.spec)

    def codebook(self) -> Tensor:
        """s8 [row groups, strips, dim, K], expanded from its factors where they are what is stored."""
        return codebook(self.spec, self.buffers)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[rows, cols] in `dtype`, rounded once from float32: the definition of what a checkpoint means."""
        return ops.dequantize(*decode_tables(self.spec, self.buffers), self.spec, dtype)


def check_buffers(spec: QuantSpec, buffers: dict[str, Tensor], where: str = "weight") -> None:
    """Raises FormatError unless the buffers have the shapes and dtypes that the spec asks for."""
    want = spec.buffer_shapes()
    if set(buffers) != set(want):
        raise FormatError(f"{where}: got buffers {sorted(buffers)}, need {sorted(want)}")
    for name, (shape, dtype) in want.items():
        got = buffers[name]
        if tuple(got.shape) != shape or got.dtype != DTYPES[dtype]:
            raise FormatError(f"{where}.{name}: got {got.dtype} {tuple(got.shape)}, need torch.{dtype} {shape}")


def judged(spec: QuantSpec) -> tuple[str, ...]:
    """The buffers that can hold values which the format does not allow."""
    return tuple(name for name in spec.buffer_shapes() if name in SCALES or name == "cb" and spec.signs)


def bad_values(spec: QuantSpec, name: str, tensor: Tensor) -> str:
    """What is wrong with the values of a buffer, as a clause, or nothing."""
    if name in SCALES and not bool(torch.isfinite(tensor).all()):
        return f"holds {int((~torch.isfinite(tensor)).sum())} values that are not finite"
    if name == "cb" and spec.signs and bool((tensor < spec.least_entry).any()):
        return f"holds {int((tensor < spec.least_entry).sum())} values below {spec.least_entry}, which a signed format does not have"
    return ""


def check_values(spec: QuantSpec, buffers: dict[str, Tensor], where: str = "weight") -> None:
    """Raises FormatError unless whatever `buffers` (those of `judged` at least, in their shapes) decode to is finite and allowed."""
    for name in judged(spec):
        if wrong := bad_values(spec, name, buffers[name]):
            raise FormatError(f"{where}.{name}: {wrong}; the file is damaged, copy it again")
    largest = 127 * buffers["gs"].float().abs().max()
    if "sz" in buffers:
        largest = largest * scale_table(buffers["sz"]).max()
    if not bool(torch.isfinite(largest)):
        raise FormatError(f"{where}.{'sz' if 'sz' in buffers else 'gs'}: the scales are so large that weights overflow; the file is "
                          "damaged, copy it again")


def codebook(spec: QuantSpec, buffers: dict[str, Tensor]) -> Tensor:
    """s8 [row groups, strips, dim, K], stored or expanded from the SVD factors."""
    return expand(buffers["cb_u"], buffers["cb_v"]).unsqueeze(2) if spec.svd_rank else buffers["cb"]


def decode_tables(spec: QuantSpec, buffers: dict[str, Tensor]) -> tuple:
    """(idx, cb, gs, sc, scale table) as the decoding operators take them; the last two are None without block scales."""
    table = scale_table(buffers["sz"]) if spec.scale_block else None
    return buffers["idx"], codebook(spec, buffers), buffers["gs"], buffers.get("sc"), table


def pack_scale_codes(codes: Tensor, spec: QuantSpec) -> Tensor:
    """u8 [rows, scale blocks] of 0..15 -> u8 [tiles, ceil(scale blocks / 2), 16]."""
    padded = codes.new_zeros(spec.tiles * 16, -(-spec.scale_blocks // 2) * 2)
    padded[: spec.rows, : spec.scale_blocks] = codes
    pairs = padded.view(spec.tiles, 16, -1, 2)
    return (pairs[..., 0] | pairs[..., 1] << 4).transpose(1, 2).contiguous()


def unpack_scale_codes(sc: Tensor, spec: QuantSpec) -> Tensor:
    """Inverse of pack_scale_codes."""
    pairs = torch.stack([sc & 15, sc >> 4], -1).permute(0, 2, 1, 3)
    return pairs.reshape(spec.tiles * 16, -1)[: spec.rows, : spec.scale_blocks]
