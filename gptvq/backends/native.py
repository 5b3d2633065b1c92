"""The compiled module gptvq._C on CPU tensors; nothing else calls it."""
from __future__ import annotations

import torch
from torch import Tensor

from ..config import QuantSpec
from ..errors import ConfigError

try:
    from .. import _C
    _why = ""
except ImportError as error:        # a source tree that was not built, or a build for another Python
    _C, _why = None, str(error)


def serves(device: torch.device) -> bool:
    return _C is not None and device.type == "cpu"


def why_not(device: torch.device) -> str:
    """One clause saying why this backend does not serve `device`."""
    if _C is None:
        return f"the compiled module gptvq._C cannot be imported ({_why}); install gptvq with `pip install .`"
    return f"it has no kernels for device type {device.type!r}"


def _call(function, *args) -> None:
    """Calls into C++ with tensors as (address, dtype, shape, strides in elements), where they are checked.

    `args` keeps the tensors alive during the call.  Raises ConfigError for a tensor that C++ refuses.
    """
    for arg in args:
        if isinstance(arg, Tensor) and arg.device.type != "cpu":
            raise ConfigError(f"{function.__name__}: got a tensor on {arg.device}, need all tensors on the CPU like the indices")
    try:
        function(*((a.data_ptr(), str(a.dtype)[6:], tuple(a.shape), a.stride()) if isinstance(a, Tensor) else a for a in args))
    except ValueError as error:
        raise ConfigError(f"{function.__name__}: {error}") from None


def _spec(spec: QuantSpec) -> tuple[int, ...]:
    return spec.rows, spec.cols, spec.dim, spec.index_bits, spec.group_rows, spec.group_cols, spec.scale_block


def pack_codes(codes: Tensor, spec: QuantSpec) -> Tensor:
    idx = torch.empty(spec.tiles, spec.blocks, spec.block_bytes, dtype=torch.uint8)
    _call(_C.pack_codes, codes.contiguous(), idx, _spec(spec))
    return idx


def unpack_codes(idx: Tensor, spec: QuantSpec) -> Tensor:
    codes = torch.empty(spec.rows, spec.vectors, dtype=torch.uint8)
    _call(_C.unpack_codes, idx.contiguous(), codes, _spec(spec))
    return codes


def dequantize(idx: Tensor, cb: Tensor, gs: Tensor, sc: Tensor | None, table: Tensor | None, spec: QuantSpec,
               dtype: torch.dtype) -> Tensor:
    out = torch.empty(spec.rows, spec.cols, dtype=dtype)
    tensors = [None if t is None else t.contiguous() for t in (idx, cb, gs, sc, table)]
    _call(_C.dequantize, *tensors, out, _spec(spec), torch.get_num_threads())
    return out
