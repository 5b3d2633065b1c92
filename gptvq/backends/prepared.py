"""Packed weights prepared for their kernels, remembered for callers that bring nothing but tensors."""
from __future__ import annotations

import threading

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..spec import QuantSpec


class Remembered:
    """linear(x, idx, cb, gs, sc, table, bias, spec, activations) by way of prepare(idx, cb, gs, sc, table, bias, spec).

    For the CPU: on a GPU what prepare makes may lie in the memory of a CUDA graph, and must not outlive the call.
    Prepares again where a tensor is another one or was changed in place since.
    """

    def __init__(self, prepare):
        self.prepare, self.preparing = prepare, threading.Lock()
        # idx -> (spec, state of the tensors, what prepare made, what it remembers, views that keep the memory from holding other tensors)
        self.known = WeakTensorKeyDictionary()

    def __call__(self, x: Tensor, idx: Tensor, cb: Tensor, gs: Tensor, sc: Tensor | None, table: Tensor | None, bias: Tensor | None,
                 spec: QuantSpec, activations: str) -> Tensor:
        tensors = idx, cb, gs, sc, table, bias
        with self.preparing:
            state, known = [_state(t) for t in tensors], self.known.get(idx)
            if known is None or known[0] != spec or known[1] != state:
                views = [None if t is None else t.detach() for t in tensors]
                made = self.prepare(*tensors, spec)
                known = self.known[idx] = spec, state, made, made.remember(idx, views, [s and s[0] for s in state], spec), views
        return known[2](x, activations)


def _state(tensor: Tensor | None) -> tuple | None:
    """From `_version` the count of changes in place, -1 for inference tensors, which have none; address, type, shape and strides."""
    if tensor is None:
        return None
    return -1 if tensor.is_inference() else tensor._version, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
