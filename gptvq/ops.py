"""The operators: argument checks and the choice of a backend.  The only module that names backend functions.

`GPTVQ_BACKEND` = reference | native forces one; otherwise the first that serves the tensor's device is taken.
"""
from __future__ import annotations

import os

import torch
from torch import Tensor

from .backends import native, reference
from .errors import BackendUnavailable, ConfigError
from .spec import QuantSpec

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


def matmul(A: Tensor, B: Tensor) -> Tensor:
    """A [m, k] @ B [k, n]; on the CPU in float32 with the same bits for any number of threads."""
    return backend(A.device).matmul(A, B)


def submatmul(C: Tensor, A: Tensor, B: Tensor) -> None:
    """C [m, n] -= A [m, k] @ B [k, n], in place; see `matmul`."""
    backend(C.device).submatmul(C, A, B)


def gram(total: Tensor, x: Tensor) -> None:
    """The upper triangle of `total` [cols, cols] += that of x^T x, x [n, cols]; see backends.reference.gram."""
    backend(total.device).gram(total, x)


def fit(x: Tensor, metric: Tensor, weight: Tensor, seeds: Tensor, rounds: tuple[tuple[int, int], ...]) -> Tensor:
    """Weighted k-means of many groups from several starts; see backends.reference.fit."""
    return backend(x.device).fit(x, metric, weight, seeds, rounds)


def column_block(W: Tensor, U: Tensor, roots: Tensor, centroids: Tensor, strip: Tensor, scale: Tensor | None,
                 group_rows: int, stale: bool = False) -> tuple[Tensor, Tensor]:
    """Quantizes a block of columns and propagates the errors inside it; see backends.reference.column_block."""
    return backend(W.device).column_block(W, U, roots, centroids, strip, scale, group_rows, stale)


def descent_block(R: Tensor, H: Tensor, index: Tensor, centroids: Tensor, strip: Tensor, scale: Tensor | None,
                  group_rows: int) -> tuple[Tensor, Tensor]:
    """Coordinate descent over the indices of a block of columns; see backends.reference.descent_block."""
    return backend(R.device).descent_block(R, H, index, centroids, strip, scale, group_rows)


def decode(index: Tensor, centroids: Tensor, strip: Tensor, scale: Tensor | None, group_rows: int) -> Tensor:
    """Codes and float centroids to weights while solving; see backends.reference.decode."""
    return backend(index.device).decode(index, centroids, strip, scale, group_rows)


def collect(index: Tensor, values: Tensor, strip: Tensor, group_rows: int, shape: tuple[int, int, int]) -> Tensor:
    """Sums of values per centroid; see backends.reference.collect."""
    return backend(index.device).collect(index, values, strip, group_rows, shape)
