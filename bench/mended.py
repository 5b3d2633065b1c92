"""The published procedure without two defects of its authors' code, to tell their share in what our recipe gains."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor

from gptvq import ops, solver

METHOD = "paper-mended"


@contextlib.contextmanager
def solving(method: str) -> Iterator[None]:
    """Within it, of METHOD alone: the EM weighs a column by 1 / U_jj^2, as the loss does that it is to lower, not by U_jj; and with block
    scales a block's columns are assigned as they are after the feedback of those before, not as they were when the block began."""
    if method != METHOD:
        yield
        return
    metrics, column_block = solver.metrics, ops.column_block

    def derived(U: Tensor, d: int, method: str) -> tuple[Tensor, Tensor]:
        roots, _ = metrics(U, d, method)
        return roots, torch.square(roots)               # roots are diagonal

    def current(*args) -> tuple[Tensor, Tensor]:
        *others, stale, signed = args
        return column_block(*others, False, signed)

    with mock.patch.object(solver, "metrics", derived), mock.patch.object(ops, "column_block", current):
        yield
