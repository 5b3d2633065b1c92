"""Quantized linears of other packages that run on GPUs, where those can be imported: random weights, as fast as real ones."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gptvq.errors import BackendUnavailable

#: name -> (rows, cols, dtype, device) -> layer, bits per weight
PEERS: dict[str, Callable[..., tuple[nn.Module, float]]] = {}


def peer(name: str):
    def register(make):
        PEERS[name] = make
        return make
    return register


def layer(name: str, rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> tuple[Callable[[Tensor], Tensor], float]:
    """(f(x [m, cols]) -> [m, rows], bits per weight); BackendUnavailable where the package cannot be imported or refuses."""
    if device.type != "cuda":
        raise BackendUnavailable(f"{name} runs on GPUs")
    try:
        return PEERS[name](rows, cols, dtype, device)
    except Exception as error:          # another package's, of whatever version is there
        raise BackendUnavailable(f"{name}: {type(error).__name__}: {error}") from error


@peer("bitsandbytes nf4")
def _bitsandbytes(rows, cols, dtype, device):
    import bitsandbytes
    made = bitsandbytes.nn.Linear4bit(cols, rows, bias=False, compute_dtype=dtype, quant_type="nf4")
    return made.to(dtype).to(device), 4.5               # an fp32 scale for 64 weights


def _aqlm(rows, cols, dtype, device, books: int, bits: int):
    import aqlm
    made = aqlm.QuantizedLinear(cols, rows, 8, 1, books, bits, bias=False, device=device, dtype=dtype)
    info = torch.iinfo(made.codes.dtype)
    made.codes.data = torch.randint(info.min, info.max + 1, made.codes.shape, dtype=torch.int64, device=device).to(made.codes.dtype)
    table = books * 2**bits * 8 * 16
    return made, books * bits / 8 + (table + 16 * rows) / (rows * cols)


@peer("aqlm 1x16")
def _aqlm_1x16(rows, cols, dtype, device):
    return _aqlm(rows, cols, dtype, device, 1, 16)


@peer("aqlm 2x8")
def _aqlm_2x8(rows, cols, dtype, device):
    return _aqlm(rows, cols, dtype, device, 2, 8)


def _humming(rows, cols, dtype, device, kind: str, bits: int):
    from humming.layer import HummingLayer
    made = HummingLayer(shape_n=rows, shape_k=cols, weight_config={"dtype": kind}, torch_dtype=dtype).to(device)
    made.load_from_unquantized(torch.randn(rows, cols, dtype=dtype, device=device))
    made.transform()
    made.prepare_default_kernel_configs()
    return made, float(bits)


@peer("humming int2")
def _humming_int2(rows, cols, dtype, device):
    return _humming(rows, cols, dtype, device, "int2", 2)


@peer("humming int4")
def _humming_int4(rows, cols, dtype, device):
    return _humming(rows, cols, dtype, device, "int4", 4)
