"""Calls of the CUDA kernels: tensors as addresses, the current stream, refusals as errors of gptvq."""
from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from ..errors import BackendUnavailable, ConfigError
from . import native

#: The functions of gptvq._C.cuda, or None where gptvq was built without CUDA; tests put those of the emulator here.
kernels = getattr(native._C, "cuda", None)
empty = torch.empty             # what outputs and scratch are made with; tests put guards around them


def stream(device: torch.device) -> int:
    """Handle of torch's current stream on `device`; 0 for CPU tensors, which only the emulator takes."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


_nothing = contextlib.nullcontext()


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes `device` the current one.  Torch goes back to the one before without a context on it, where it has none; kernels would not."""
    return torch.cuda.device(device) if device.type == "cuda" and device.index != torch.cuda.current_device() else _nothing


def dense(t: Tensor | None, alignment: int = 1) -> Tensor | None:
    """`t`, or a copy of it, contiguous and with an address that is a multiple of `alignment` bytes."""
    if t is None or t.is_contiguous() and t.data_ptr() % alignment == 0:
        return t
    return t.clone(memory_format=torch.contiguous_format)


def call(name: str, *args):
    """kernels.name(*args, device, stream), tensors as (address, dtype, shape, strides in elements), on the device of the first of them.

    The device runs it later: what `args` holds is kept from being reused by torch's allocator, which orders its memory by stream.
    Raises ConfigError for a tensor that the kernel refuses, BackendUnavailable where CUDA does.
    """
    device = next(a.device for a in args if isinstance(a, Tensor))
    for a in args:
        if isinstance(a, Tensor) and a.device != device:
            raise ConfigError(f"{name}: got tensors on {device} and {a.device}, need all on one device")
    passed = ((a.data_ptr(), str(a.dtype)[6:], tuple(a.shape), a.stride()) if isinstance(a, Tensor) else a for a in args)
    try:
        with on(device):
            return getattr(kernels, name)(*passed, device.index or 0, stream(device))
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None
    except RuntimeError as error:
        raise BackendUnavailable(f"{name} on {device}: {error}") from None
