"""The CUDA kernels of gptvq on tensors of an NVIDIA GPU of compute capability 8.0 or newer."""
from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import BackendUnavailable
from ..spec import QuantSpec
from . import cuda_call, native, reference
from .cuda_call import call, dense
from .cuda_linear import linear, prepare_linear  # noqa: F401
from .cuda_quantize import column_block, descent_block, fit  # noqa: F401
from .reference import matvec  # noqa: F401

LEAST = 8, 0                    # compute capability: what the kernels are compiled for
PANEL_COLS = 2048               # columns of a split product at a time
#: Columns that an error is taken from at once; those behind them wait for the errors of as many columns, and one product with them.
#: An update by 128 columns moves 8 bytes of a weight for 256 operations on it, in an H100 6/10 of the time that those take; by 1024, 1/12.
LAZY_COLS = 1024
MOST_SUMS = 96 * 1024 // 8      # numbers of one codebook that `collect` has shared memory for


@functools.lru_cache(maxsize=None)
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (0, 0)


@functools.lru_cache(maxsize=None)
def _runtime_works() -> bool:
    """Whether the driver takes the runtime that this was built with; torch's may be an older one."""
    return native.cuda_info()["available"]


def serves(device: torch.device) -> bool:
    built = native._C is not None and cuda_call.kernels is not None
    return device.type == "cuda" and built and _runtime_works() and _capability(device) >= LEAST


def why_not(device: torch.device) -> str:
    """One clause saying why this backend does not serve `device`."""
    if native._C is None:
        return native.why_not(device)
    if cuda_call.kernels is None:
        return "gptvq was built without CUDA (where nvcc is found, `pip install .` builds it in)"
    found = native.cuda_info()
    if not found["available"]:
        return f"no NVIDIA GPU can be used: {found['why']}"
    if device.type != "cuda":
        return f"its kernels are for device type 'cuda', and the tensor is on {str(device)!r}"
    if not torch.cuda.is_available():
        return f"torch sees no NVIDIA GPU (torch built with CUDA {torch.version.cuda})"
    have, need = (".".join(map(str, version)) for version in (_capability(device), LEAST))
    return f"{torch.cuda.get_device_name(device)} has compute capability {have}, and the kernels need {need} or newer"


def free_bytes(device: torch.device) -> tuple[int, int] | None:
    """(free, total) bytes of its memory, what torch keeps for reuse counted as free; None where it is not a GPU's."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total


def require_memory(device: torch.device, need: int, what: str, fits: Callable[[int], str]) -> None:
    """Raises BackendUnavailable unless `need` bytes are free; fits(free bytes) says what would fit."""
    have = free_bytes(device)
    if have is not None and need > have[0]:
        free, total = (number / 1e9 for number in have)
        raise BackendUnavailable(f"{what}: needs {need / 1e9:.3g} GB on {device}, where {free:.3g} of {total:.3g} GB are free; "
                                 f"{fits(have[0])}")


# ---- packed weights
def _spec(spec: QuantSpec) -> tuple[int, ...]:
    return spec.rows, spec.cols, spec.dim, spec.index_bits, spec.group_rows, spec.group_cols, spec.scale_block


def pack_codes(codes: Tensor, spec: QuantSpec) -> Tensor:
    idx = cuda_call.empty(spec.tiles, spec.blocks, spec.block_bytes, dtype=torch.uint8, device=codes.device)
    call("pack_codes", dense(codes), idx, _spec(spec))
    return idx


def unpack_codes(idx: Tensor, spec: QuantSpec) -> Tensor:
    codes = cuda_call.empty(spec.rows, spec.vectors, dtype=getattr(torch, spec.code_dtype), device=idx.device)
    call("unpack_codes", dense(idx, 4), codes, _spec(spec))
    return codes


def dequantize(idx: Tensor, cb: Tensor, gs: Tensor, sc: Tensor | None, table: Tensor | None, spec: QuantSpec,
               dtype: torch.dtype) -> Tensor:
    out = cuda_call.empty(spec.rows, spec.cols, dtype=dtype, device=idx.device)
    call("dequantize", dense(idx, 4), *map(dense, (cb, gs, sc, table)), out, _spec(spec))
    return out


# ---- while solving
def decode(index: Tensor, centroids: Tensor, strip: Tensor, scale: Tensor | None, group_rows: int) -> Tensor:
    d = centroids.shape[3]
    if not _all_float32(centroids, scale):
        return reference.decode(index, centroids, strip, scale, group_rows)
    Q = cuda_call.empty(len(index), index.shape[1] * d, dtype=torch.float32, device=index.device)
    call("decode", dense(index), dense(centroids, 4 * d), dense(strip), dense(scale), group_rows, Q)
    return Q


def collect(index: Tensor, values: Tensor, strip: Tensor, group_rows: int, shape: tuple[int, int, int]) -> Tensor:
    f = values.shape[2]
    if not _all_float32(values) or shape[2] * f > MOST_SUMS:
        return reference.collect(index, values, strip, group_rows, shape)
    sums = cuda_call.empty(*shape, f, dtype=torch.float64, device=index.device)
    call("collect", dense(index), dense(values), *_columns_by_strip(strip, shape[1]), group_rows, sums)
    return sums


_by_strip = WeakTensorKeyDictionary()


def _columns_by_strip(strip: Tensor, strips: int) -> tuple[Tensor, Tensor]:
    """(columns sorted by strip, where each strip's begin [strips + 1]); kept, since a layer asks for one again and again."""
    known, made_from = _by_strip.get(strip), (strips, 0 if strip.is_inference() else strip._version)
    if known is None or known[0] != made_from:
        order = torch.argsort(strip, stable=True)
        bounds = torch.searchsorted(strip[order], torch.arange(strips + 1, device=strip.device))
        known = _by_strip[strip] = made_from, order, bounds
    return known[1:]


# ---- products: those of cuBLAS, in full precision
def _all_float32(*tensors: Tensor | None) -> bool:
    return all(t is None or t.dtype == torch.float32 for t in tensors)


@contextlib.contextmanager
def _products(precision: str = "ieee"):
    """float32 products in float32 ("ieee") or in "tf32", whatever precision the caller chose for the model."""
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    if (before == "tf32") == (precision == "tf32"):
        yield
        return
    products.fp32_precision = precision
    try:
        yield
    finally:
        products.fp32_precision = before


def matmul(A: Tensor, B: Tensor) -> Tensor:
    with _products():
        return A @ B


def submatmul(C: Tensor, A: Tensor, B: Tensor) -> None:
    with _products():
        C.addmm_(A, B, alpha=-1)


def matmul_3xtf32(A: Tensor, B: Tensor) -> Tensor:
    """A @ B in tensor cores, with about the error of float32.

    A = A1 + A2 exactly, A1 with the 11 significant bits of TF32 and A2 with 12 or less, of which TF32 keeps 11; B likewise.  What is
    lost, A2 B2 and the last bit of A2 and B2, is below 2^-21 |A| |B|, and a float32 sum of hundreds of products loses as much.
    """
    if not _all_float32(A, B):
        return matmul(A, B)
    A1, A2 = _tf32_parts(A)
    C = torch.empty(A.shape[0], B.shape[1], dtype=A.dtype, device=A.device)
    for at in range(0, B.shape[1], PANEL_COLS):             # so that no second and third B is needed
        B1, B2 = _tf32_parts(B[:, at : at + PANEL_COLS])
        panel = torch.zeros(A.shape[0], B1.shape[1], dtype=A.dtype, device=A.device)
        for left, right in ((A2, B1), (A1, B2), (A1, B1)):  # the small ones first
            _add_tf32(panel, left, right)
        C[:, at : at + PANEL_COLS] = panel
    return C


def _tf32_parts(t: Tensor) -> tuple[Tensor, Tensor]:
    """(t rounded to TF32, what is left of it, without an error)."""
    first = ((t.contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
    return first, t - first


def _add_tf32(C: Tensor, A: Tensor, B: Tensor) -> None:
    with _products("tf32"):
        C.addmm_(A, B)


def gram(total: Tensor, x: Tensor) -> None:
    """By panels of rows, each from the diagonal on: little more than half of the whole product."""
    cols = x.shape[1]
    panel = max(512, -(-cols // 1024) * 128)
    for at in range(0, cols, panel):
        cross(total[at : at + panel, at:], x[:, at : at + panel], x[:, at:])


def cross(total: Tensor, a: Tensor, b: Tensor) -> None:
    """In tensor cores where both are of one 16-bit type: their products are exact in float32, in which they are summed."""
    if total.dtype == torch.float32 and a.dtype == b.dtype and a.device.type == "cuda" and (a.dtype == torch.bfloat16 or (
            a.dtype == torch.float16 and not torch.backends.cuda.matmul.allow_fp16_accumulation)):
        torch.addmm(total, a.T, b, out_dtype=torch.float32, out=total)
    else:
        with _products():
            reference.cross(total, a, b)
