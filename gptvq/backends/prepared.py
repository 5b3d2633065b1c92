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
        self.known = WeakTensorKeyDictionary()      # idx -> (spec, state of the tensors, what prepare made, what it remembers)

    def __call__(self, x: Tensor, idx: Tensor, cb: Tensor, gs: Tensor, sc: Tensor | None, table: Tensor | None, bias: Tensor | None,
                 spec: QuantSpec, activations: str) -> Tensor:
        state, known = [_state(t) for t in (idx, cb, gs, sc, table, bias)], self.known.get(idx)
        if known is None or known[0] != spec or known[1] != state:
            made = self.prepare(idx, cb, gs, sc, table, bias, spec)
            known = self.known[idx] = spec, state, made, made.remember(idx, spec, state)
        return known[2](x, activations)


def _state(tensor: Tensor | None) -> tuple[int, int]:
    """Address and, from `_version`, the count of changes in place, which inference tensors do not have."""
    return (0, -1) if tensor is None else (tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version)
