"""The operators: argument checks and the choice of a backend.  The only module that names backend functions.

`GPTVQ_BACKEND` = native | cuda | triton | reference forces one; otherwise the first that serves the tensor's device is taken.
"""
from __future__ import annotations

import os
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from .backends import cuda, native, reference, triton
from .backends.watching import PLAIN, transformed, watched
from .config import ACTIVATIONS
from .errors import BackendUnavailable, ConfigError
from .spec import QuantSpec

BACKENDS = {"native": native, "cuda": cuda, "triton": triton, "reference": reference}
#: What is tried on a type of device before the reference, best first.
_PREFERRED = {"cpu": (native,), "cuda": (cuda, triton)}
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def backend(device: torch.device):
    """The module that serves packed-weight operators on `device`; says once where that is the reference for want of a build."""
    module = chosen(device)
    if module is reference:
        _warn_once(device)
    return module


def chosen(device: torch.device):
    """As `backend`, without a word."""
    choice = os.environ.get("GPTVQ_BACKEND", "")
    if not choice:
        return next((module for module in _PREFERRED.get(device.type, ()) if module.serves(device)), reference)
    if choice not in BACKENDS:
        raise BackendUnavailable(f"GPTVQ_BACKEND={choice!r} is unknown; choose one of {', '.join(BACKENDS)}, or unset it")
    if choice == "reference":
        return reference
    if not BACKENDS[choice].serves(device):
        raise BackendUnavailable(f"GPTVQ_BACKEND={choice}, but {BACKENDS[choice].why_not(device)}; unset it to use another backend")
    return BACKENDS[choice]


def not_compiled(device: torch.device) -> str:
    """What to say where the reference serves `device` because gptvq._C is missing, and nobody asked for it; else ""."""
    if device.type != "cpu" or os.environ.get("GPTVQ_BACKEND") or native.serves(device):
        return ""
    return f"the reference serves the CPU, hundreds of times slower than the kernels: {native.why_not(device)}"


_warned = False


def _warn_once(device: torch.device) -> None:
    global _warned
    if not _warned and (text := not_compiled(device)):
        _warned = True
        warnings.warn(text, stacklevel=4)


def require_memory(device: torch.device, need: int, what: str, fits: Callable[[int], str]) -> None:
    """Raises BackendUnavailable where `device` is a GPU with less than `need` bytes free; fits(free bytes) says what would fit."""
    if device.type == "cuda" or cuda.serves(device):
        cuda.require_memory(device, need, what, fits)


def free_bytes(device: torch.device) -> tuple[int, int] | None:
    """(free, total) bytes of a GPU's memory; None where `device` is none."""
    return cuda.free_bytes(device)


def pack_codes(codes: Tensor, spec: QuantSpec) -> Tensor:
    """Codes of `spec.code_dtype` [rows, vectors], each below 2**code_bits -> u8 [tiles, blocks, block_bytes].

    Padding rows and columns hold code 0.
    """
    if str(codes.dtype) != f"torch.{spec.code_dtype}" or codes.shape != (spec.rows, spec.vectors):
        raise ConfigError(f"codes: got {codes.dtype} {tuple(codes.shape)}, need torch.{spec.code_dtype} {(spec.rows, spec.vectors)}")
    if spec.code_bits != 8 and (int(codes.max()) >= 1 << spec.code_bits or int(codes.min()) < 0):
        wrong = int(codes.max()) if int(codes.min()) >= 0 else int(codes.min())
        raise ConfigError(f"codes: got {wrong}, need values from 0 to {(1 << spec.code_bits) - 1}")
    return backend(codes.device).pack_codes(codes.contiguous(), spec)


def unpack_codes(idx: Tensor, spec: QuantSpec) -> Tensor:
    """u8 [tiles, blocks, block_bytes] -> codes of `spec.code_dtype` [rows, vectors]."""
    return backend(idx.device).unpack_codes(idx.contiguous(), spec)


def dequantize(idx: Tensor, cb: Tensor, gs: Tensor, sc: Tensor | None, table: Tensor | None, spec: QuantSpec,
               dtype: torch.dtype = torch.float32) -> Tensor:
    """Packed buffers and the f32 scale table [scale blocks, 16] -> [rows, cols] in `dtype`."""
    if dtype not in FLOATS:
        raise ConfigError(f"dequantize: got dtype {dtype}, need torch.float32, torch.float16 or torch.bfloat16")
    return backend(idx.device).dequantize(idx, cb, gs, sc, table, spec, dtype)


def check_input(x: Tensor, cols: int, name: str = "linear") -> None:
    """Raises ConfigError unless x is a float tensor [.., cols]."""
    if x.dtype not in FLOATS or x.ndim == 0 or x.shape[-1] != cols:
        raise ConfigError(f"{name}: got x {x.dtype} {tuple(x.shape)}, need torch.float32, float16 or bfloat16 with last dimension {cols}")


def check_activations(activations: str) -> None:
    """Raises ConfigError unless `activations` is one of config.ACTIVATIONS."""
    if activations not in ACTIVATIONS:
        raise ConfigError(f"activations: got {activations!r}, need one of {', '.join(ACTIVATIONS)}")


def prepare_linear(idx: Tensor, cb: Tensor, gs: Tensor, sc: Tensor | None, table: Tensor | None, bias: Tensor | None, spec: QuantSpec):
    """f(x, activations) -> y for one packed weight on its device, without the checks and look-ups that `linear` makes on each call.

    It shares the tensors, but copies gs, and a bias that is not float32: prepare again after changing those in place.
    """
    return backend(idx.device).prepare_linear(idx, cb, gs, sc, table, bias, spec)


def linear(x: Tensor, idx: Tensor, cb: Tensor, gs: Tensor, sc: Tensor | None, table: Tensor | None, bias: Tensor | None,
           spec: QuantSpec, activations: str = "a16", gradients: bool = True) -> Tensor:
    """x [.., cols] -> x W^T + bias [.., rows] in x's dtype, as one operator, which torch.compile takes as a whole.

    Without `gradients` as another one, faster to call, for where none can be asked for.
    """
    operator = torch.ops.gptvq.linear if gradients else torch.ops.gptvq.linear_inference
    return operator(x, idx, cb, gs, sc, table, bias, spec.key, activations)


def dequantize_operator(idx: Tensor, cb: Tensor, gs: Tensor, sc: Tensor | None, table: Tensor | None, spec: QuantSpec,
                        dtype: torch.dtype) -> Tensor:
    """`dequantize` as the operator gptvq::dequantize."""
    return torch.ops.gptvq.dequantize(idx, cb, gs, sc, table, spec.key, dtype)


def matvec(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear of one token x [.., cols] with a dense weight [rows, cols], all bfloat16, without gradients."""
    return backend(x.device).matvec(x, weight, bias)


def matvec_operator(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`matvec` as the operator gptvq::matvec."""
    return torch.ops.gptvq.matvec(x, weight, bias)


def matmul(A: Tensor, B: Tensor) -> Tensor:
    """A [m, k] @ B [k, n]; on the CPU in float32 with the same bits for any number of threads."""
    return backend(A.device).matmul(A, B)


def matmul_split(A: Tensor, B: Tensor) -> Tensor:
    """As `matmul`; by the CUDA backend in tensor cores, with about the error of float32: see backends.cuda.matmul_3xtf32."""
    module = backend(A.device)
    return cuda.matmul_3xtf32(A, B) if module is cuda else module.matmul(A, B)


def lazy_columns(device: torch.device, cols: int) -> int:
    """How many of `cols` columns the trailing update of a pass takes at once: on the CPU all of them, whose bits others rely on."""
    return cuda.LAZY_COLS if backend(device) is cuda else cols


def submatmul(C: Tensor, A: Tensor, B: Tensor) -> None:
    """C [m, n] -= A [m, k] @ B [k, n], in place; see `matmul`."""
    backend(C.device).submatmul(C, A, B)


def gram(total: Tensor, x: Tensor) -> None:
    """The upper triangle of `total` [cols, cols] += that of x^T x, x [n, cols]; see backends.reference.gram."""
    backend(total.device).gram(total, x)


def cross(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total [p, q] += a^T b, a [n, p], b [n, q]; see backends.reference.cross."""
    backend(total.device).cross(total, a, b)


def fit(x: Tensor, metric: Tensor, weight: Tensor, seeds: Tensor, rounds: tuple[tuple[int, int], ...]) -> Tensor:
    """Weighted k-means of many groups from several starts; see backends.reference.fit."""
    return backend(x.device).fit(x, metric, weight, seeds, rounds)


def column_block(W: Tensor, U: Tensor, roots: Tensor, centroids: Tensor, strip: Tensor, scale: Tensor | None,
                 group_rows: int, stale: bool = False, signed: bool = False) -> tuple[Tensor, Tensor]:
    """Quantizes a block of columns and propagates the errors inside it; see backends.reference.column_block."""
    return backend(W.device).column_block(W, U, roots, centroids, strip, scale, group_rows, stale, signed)


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


# ---- What torch.compile takes as a whole.  Library.define costs a call a fifth of the decorator torch.library.custom_op.
_library = torch.library.Library("gptvq", "DEF")
_LINEAR = "(Tensor x, Tensor idx, Tensor cb, Tensor gs, Tensor? sc, Tensor? table, Tensor? bias, str spec, str activations) -> Tensor"
_library.define("dequantize(Tensor idx, Tensor cb, Tensor gs, Tensor? sc, Tensor? table, str spec, ScalarType dtype) -> Tensor")
_library.define("matvec(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.define("linear" + _LINEAR)
_library.define("linear_inference" + _LINEAR)       # for torch.no_grad: looking for gradients costs a call as much as a small layer's kernel


def _linear(x, idx, cb, gs, sc, table, bias, spec, activations):
    spec = QuantSpec.from_key(spec)
    check_input(x, spec.cols)
    check_activations(activations)
    return backend(x.device).linear(x, idx, cb, gs, sc, table, bias, spec, activations)


def _linear_on_cpu(*args):
    y = native.recall(*args)
    return _linear(*args) if y is None else y


def _linear_fake(x, idx, cb, gs, sc, table, bias, spec, activations):
    spec = QuantSpec.from_key(spec)
    check_input(x, spec.cols)
    check_activations(activations)
    return x.new_empty((*x.shape[:-1], spec.rows))


def _linear_context(ctx, inputs, output):
    x, *weight, bias, spec, _ = inputs
    ctx.save_for_backward(*weight)
    ctx.spec, ctx.bias_dtype = spec, None if bias is None else bias.dtype


def _linear_backward(ctx, grad):
    W = torch.ops.gptvq.dequantize(*ctx.saved_tensors, ctx.spec, grad.dtype)
    to_bias = None if ctx.bias_dtype is None else grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return grad @ W, None, None, None, None, None, to_bias, None, None


def _dequantize(idx, cb, gs, sc, table, spec, dtype):
    return dequantize(idx, cb, gs, sc, table, QuantSpec.from_key(spec), dtype)


def _dequantize_fake(idx, cb, gs, sc, table, spec, dtype):
    spec = QuantSpec.from_key(spec)
    return idx.new_empty(spec.rows, spec.cols, dtype=dtype)


for _name in ("linear", "linear_inference"):
    _library.impl(_name, _linear_on_cpu, "CPU")
    _library.impl(_name, _linear, "CUDA")
    torch.library.register_fake(f"gptvq::{_name}", _linear_fake, lib=_library)
for _device in ("CPU", "CUDA"):
    _library.impl("dequantize", _dequantize, _device)
    _library.impl("matvec", matvec, _device)
torch.library.register_fake("gptvq::dequantize", _dequantize_fake, lib=_library)
torch.library.register_fake("gptvq::matvec", lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])), lib=_library)
torch.library.register_autograd("gptvq::linear", _linear_backward, setup_context=_linear_context, lib=_library)
