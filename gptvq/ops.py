"""The operators: argument checks and the choice of a backend.  The only module that names backend functions.

`GPTVQ_BACKEND` = reference | native forces one; otherwise the first that serves the tensor's device is taken.
"""
from __future__ import annotations

import os

import torch
from torch import Tensor

from .backends import native, reference
from .config import QuantSpec
from .errors import BackendUnavailable, ConfigError

BACKENDS = ("native", "reference")


def backend(device: torch.device):
    """The module that serves packed-weight operators on `device`."""
    choice = os.environ.get("GPTVQ_BACKEND", "")
    if choice not in ("", *BACKENDS):
        raise BackendUnavailable(f"GPTVQ_BACKEND={choice!r} is unknown; choose one of {', '.join(BACKENDS)}, or unset it")
    if choice == "native" and not native.serves(device):
        raise BackendUnavailable(f"GPTVQ_BACKEND=native, but {native.why_not(device)}; unset it to use the reference backend")
    return native if choice != "reference" and native.serves(device) else reference


def pack_codes(codes: Tensor, spec: QuantSpec) -> Tensor:
    """u8 [rows, vectors], each below K -> u8 [tiles, blocks, block_bytes]; padding rows and columns hold code 0."""
    if codes.dtype != torch.uint8 or codes.shape != (spec.rows, spec.vectors):
        raise ConfigError(f"codes: got {codes.dtype} {tuple(codes.shape)}, need torch.uint8 {(spec.rows, spec.vectors)}")
    if spec.code_bits < 8 and int(codes.max()) >= spec.codewords:
        raise ConfigError(f"codes: got {int(codes.max())}, need values below the {spec.codewords} centroids")
    return backend(codes.device).pack_codes(codes.contiguous(), spec)


def unpack_codes(idx: Tensor, spec: QuantSpec) -> Tensor:
    """u8 [tiles, blocks, block_bytes] -> u8 [rows, vectors]."""
    return backend(idx.device).unpack_codes(idx.contiguous(), spec)


def dequantize(idx: Tensor, cb: Tensor, gs: Tensor, sc: Tensor | None, table: Tensor | None, spec: QuantSpec,
               dtype: torch.dtype = torch.float32) -> Tensor:
    """Packed buffers and the f32 scale table [scale blocks, 16] -> [rows, cols] in `dtype`."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ConfigError(f"dequantize: got dtype {dtype}, need torch.float32, torch.float16 or torch.bfloat16")
    return backend(idx.device).dequantize(idx, cb, gs, sc, table, spec, dtype)


def quantizer(device: torch.device):
    """The module that serves the quantization operators (em, column_block, descent_block) on `device`."""
    return reference
