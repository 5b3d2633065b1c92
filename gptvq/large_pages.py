"""Weights in large pages of memory: what reads them as fast as memory goes waits less often for where a page is."""
from __future__ import annotations

import mmap
import os
import weakref
from pathlib import Path

import torch
from torch import Tensor, nn

from .embedding import VQEmbedding
from .machine import available_memory

SWITCH = "GPTVQ_LARGE_PAGES"        # 0: leave weights where they are
_PAGE, _LINE = 2 << 20, 64          # bytes, of a large page and of a line of the caches, at whose start kernels expect a tensor
_SYSTEM = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_settled: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()      # memory that tensors lie in -> its addresses


def settle(model: nn.Module) -> nn.Module:
    """Copies what every token reads, all weights on the CPU but those of embeddings, into large pages, in the order of modules -> model.

    A loaded model lies in pages of 4 KB, those of its file, which processes share; from pages of 2 MB kernels read cold weights faster
    (`python -m bench.pages`).  Parameters stay the same objects.  Nothing happens where `why_not` says so, where the copy would take more
    than half of the memory that is left, and to what lies in large pages already.
    """
    read = [module for module in model.modules() if not isinstance(module, (nn.Embedding, VQEmbedding))]
    tensors = {id(t): t for module in read for t in (*module._parameters.values(), *module._buffers.values()) if _movable(t)}
    room = sum(_room(t) for t in tensors.values())
    if room and not why_not() and 2 * room <= available_memory() and (memory := _large_pages(room)) is not None:
        with torch.inference_mode(False):
            model._apply(_Move(tensors, memory))
    return model


def why_not() -> str:
    """Why weights are left in small pages here, or ""."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0"
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return "this system has none"
    try:
        return f"switched off in {_SYSTEM}" if "[never]" in _SYSTEM.read_text() else ""
    except OSError:                     # not there, or not for this process to read
        return f"{_SYSTEM} cannot be read"


class _Move:
    """f(tensor) -> the same values in `memory` where it is one of `tensors`, {id: tensor}; a second time the same one."""

    def __init__(self, tensors: dict[int, Tensor], memory: mmap.mmap):
        self.tensors, self.memory, self.at = tensors, memory, -_settled[memory].start % _PAGE
        self.moved: dict[int, Tensor] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        if self.tensors.get(id(tensor)) is not tensor:
            return tensor
        if id(tensor) not in self.moved:
            copy = torch.frombuffer(self.memory, dtype=tensor.dtype, count=tensor.numel(), offset=self.at).view(tensor.shape)
            self.moved[id(tensor)] = copy.copy_(tensor.detach())
            self.at += _room(tensor)
        return self.moved[id(tensor)]


def _movable(tensor: Tensor | None) -> bool:
    return (type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu" and tensor.layout == torch.strided
            and tensor.is_contiguous() and tensor.numel() > 0 and not tensor.is_inference()       # whose memory torch will not change
            and not any(tensor.data_ptr() in there for there in _settled.values()))


def _room(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // _LINE) * _LINE


def _large_pages(size: int) -> mmap.mmap | None:
    """Memory for tensors of `size` bytes from the start of a large page on; None where the system refuses."""
    size = (size // _PAGE + 2) * _PAGE
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return None
    start = torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr()
    _settled[memory] = range(start, start + size)
    return memory
