"""Packed weights prepared for their kernels, remembered for callers that bring nothing but tensors."""
from __future__ import annotations

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..spec import QuantSpec


class Remembered:
    """linear(x, idx, cb, gs, sc, table, bias, spec, activations) by way of prepare(idx, cb, gs, sc, table, bias, spec).

    For the CPU: on a GPU what prepare makes may lie in the memory of a CUDA graph, and must not outlive the call.
    Prepares again where a tensor is another one or was changed in place since.
    """

    def __init__(self, prepare):
        self.prepare = prepare
        self.known = WeakTensorKeyDictionary()      # idx -> (state of the other tensors, what prepare made)

    def __call__(self, x: Tensor, idx: Tensor, cb: Tensor, gs: Tensor, sc: Tensor | None, table: Tensor | None, bias: Tensor | None,
                 spec: QuantSpec, activations: str) -> Tensor:
        state, known = [_state(t) for t in (cb, gs, sc, table, bias)], self.known.get(idx)
        if known is None or known[0] != state:
            known = self.known[idx] = state, self.prepare(idx, cb, gs, sc, table, bias, spec)
        return known[1](x, activations)


def _state(tensor: Tensor | None) -> tuple | None:
    """Address and, from `_version`, the count of changes in place."""
    return None if tensor is None else (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
