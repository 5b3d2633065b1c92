"""4-bit integers in this package's tiles, and a plain read of memory: the baselines of int4.cpp, compiled when first used."""
from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from ctypes import POINTER, c_int, c_long, c_uint64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from gptvq.errors import BackendUnavailable

from .runner import ROOT

SOURCE = Path(__file__).with_name("int4.cpp")
FLAGS = ["-O3", "-std=c++20", "-shared", "-fPIC", "-pthread", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni",
         "-mf16c", "-mfma"]
NEEDS = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "f16c", "fma"}
TILE_ROWS, BLOCK_COLS, PAIR_BYTES = 16, 32, 576


@functools.cache
def load() -> ctypes.CDLL:
    """The compiled library; BackendUnavailable on another processor or without a compiler."""
    missing = NEEDS - _cpu_flags()
    if missing:
        raise BackendUnavailable("the INT4 kernel and the read probe need AVX-512 VNNI; this processor has no "
                                 f"{', '.join(sorted(missing))}")
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None:
        raise BackendUnavailable("the INT4 kernel and the read probe are compiled when used, and there is no compiler c++; set CXX")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    key = hashlib.sha256("\0".join([SOURCE.read_text(encoding="utf-8"), version, *FLAGS]).encode()).hexdigest()[:16]
    library = ROOT / "build" / "bench" / f"int4-{key}.so"
    if not library.is_file():
        library.parent.mkdir(parents=True, exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}")
        done = subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(partial)], capture_output=True, text=True)
        if done.returncode:
            raise BackendUnavailable(f"{compiler} cannot compile {SOURCE.name}: {done.stderr.strip()}")
        os.replace(partial, library)
    found = ctypes.CDLL(str(library))
    found.int4_gemv.restype, found.int4_gemv.argtypes = None, [POINTER(c_void_p), c_long, c_void_p, c_void_p, c_long, c_long, c_int, c_int]
    found.read_stretches.restype, found.read_stretches.argtypes = c_uint64, [POINTER(c_void_p), c_long, c_long, c_int]
    return found


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [rows, cols] -> (u8 [rows, cols] of 0..15, fp16 [rows, ceil(cols / 32)]); w = scale * (q - 8)."""
    rows, cols = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -cols % BLOCK_COLS)).view(rows, -1, BLOCK_COLS)
    scale = (padded.abs().amax(-1) / 7.5).half()
    codes = (padded / scale.float().clamp_min(1e-30)[..., None] + 8).round().clamp(0, 15).to(torch.uint8)
    return codes.view(rows, -1)[:, :cols], scale


def pack(codes: Tensor, scale: Tensor) -> Tensor:
    """u8 [tiles, pairs, 576] in the layout of int4.cpp, 64-byte aligned; the padding is zero."""
    rows, cols = codes.shape
    tiles, pairs = -(-rows // TILE_ROWS), -(-cols // (2 * BLOCK_COLS))
    full = torch.full((tiles * TILE_ROWS, pairs * 2 * BLOCK_COLS), 8, dtype=torch.uint8)
    full[:rows, :cols] = codes
    scales = torch.zeros(tiles * TILE_ROWS, 2 * pairs, dtype=torch.float16)
    scales[:rows, :scale.shape[1]] = scale
    # [tile, row, pair, half, plane, nibble, j]: a byte is a row's column j of both nibbles
    parts = full.view(tiles, TILE_ROWS, pairs, 2, 4, 2, 4)
    planes = (parts[..., 0, :] | parts[..., 1, :] << 4).permute(0, 2, 3, 4, 1, 5).reshape(tiles, pairs, 512)
    tail = scales.view(tiles, TILE_ROWS, pairs, 2).permute(0, 2, 3, 1).contiguous().view(torch.uint8).view(tiles, pairs, 64)
    return aligned(torch.cat([planes, tail], 2))


def aligned(data: Tensor) -> Tensor:
    """A copy that begins at a multiple of 64 bytes."""
    room = torch.empty(data.numel() + 63, dtype=torch.uint8)
    start = -room.data_ptr() % 64
    return room[start: start + data.numel()].view(data.shape).copy_(data)


def _addresses(buffers: list[Tensor]):
    return (c_void_p * len(buffers))(*(buffer.data_ptr() for buffer in buffers))


class Products:
    """x float32 [cols] times each of the packed `weights` [rows, cols], one after the other, by `threads` threads.

    `bits` of the activations: 8, one scale per 32 columns, or 16.  `y` [rows] is that of the last product.
    """

    def __init__(self, weights: list[Tensor], rows: int, x: Tensor, bits: int, threads: int):
        self.library, self.calls, self.weights, self.x = load(), len(weights), weights, x.contiguous()
        self.out = torch.empty(-(-rows // TILE_ROWS) * TILE_ROWS)
        self.y = self.out[:rows]
        self.args = (_addresses(weights), len(weights), self.x.data_ptr(), self.out.data_ptr(), rows, len(x), bits, threads)

    def __call__(self) -> Tensor:
        self.library.int4_gemv(*self.args)
        return self.y


class Reads:
    """Reads each of the `buffers`, one after the other, by `threads` threads: what no kernel over these bytes can beat."""

    def __init__(self, buffers: list[Tensor], threads: int):
        self.library, self.calls, self.buffers = load(), len(buffers), buffers
        self.args = (_addresses(buffers), len(buffers), buffers[0].numel(), threads)

    def __call__(self) -> int:
        return self.library.read_stretches(*self.args)
