"""The CUDA kernels of gptvq on tensors of an NVIDIA GPU of compute capability 8.0 or newer."""
from __future__ import annotations

import functools

import torch

from . import cuda_call, native
from .cuda_linear import linear, prepare_linear  # noqa: F401
from .cuda_quantize import column_block, descent_block, fit  # noqa: F401
from .reference import collect, cross, decode, dequantize, gram, matmul, pack_codes, submatmul, unpack_codes  # noqa: F401

LEAST = 8, 0                    # compute capability: what the kernels are compiled for


@functools.lru_cache(maxsize=None)
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (0, 0)


def serves(device: torch.device) -> bool:
    return device.type == "cuda" and cuda_call.kernels is not None and _capability(device) >= LEAST


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
