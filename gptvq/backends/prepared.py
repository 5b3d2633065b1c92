"""Packed layers prepared for products, found again by their tensors: for calls that bring nothing else."""
from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_prepared = WeakTensorKeyDictionary()       # idx -> (make, source, what make returned)


def source(*tensors: Tensor | None) -> list:
    """What a layer was made from; `_version` counts changes in place."""
    return [None if t is None else (t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]


def prepared(make: Callable, idx: Tensor, cb: Tensor, gs: Tensor, sc: Tensor | None, table: Tensor | None, bias: Tensor | None, spec):
    """make(idx, cb, gs, sc, table, bias, spec), or what it returned before where idx is the same and the others have not changed."""
    now = source(cb, gs, sc, table, bias)
    found = _prepared.get(idx)
    if found is None or found[0] is not make or found[1] != now:
        found = _prepared[idx] = make, now, make(idx, cb, gs, sc, table, bias, spec)
    return found[2]
