"""GPTQ (arXiv 2210.17323), the scalar baseline: integers on a grid per group of columns, errors propagated as in our solver."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from gptvq.drift import Stage, collect, find_stages
from gptvq.hessian import Hessian
from gptvq.model import dense_weight, embed
from gptvq.stream import BlockStream

from .rounding import bits_per_value, grid, to_grid
from .runner import log

BLOCK = 128                     # columns between two updates of all later ones


@torch.no_grad()
def gptq(weight: Tensor, hessian: Hessian, bits: int, group: int, damp: float = 0.01) -> Tensor:
    """W [rows, cols] -> the same on b-bit grids, float32: columns in the order of descending diag H, grids of the groups taken from
    the weights as they are at the start ("static groups"), so that the order costs no bits.
    """
    W = weight.float().clone()
    rows, cols = W.shape
    H = hessian.matrix()
    order = H.diagonal().argsort(descending=True, stable=True)
    U = hessian.factor(("gptq", 1), order, damp, torch.float32).U
    scale, zero = (t.repeat_interleave(group, 1)[:, :cols][:, order] for t in grid(W, bits, group))
    W, Q = W[:, order], torch.empty_like(W)
    for first in range(0, cols, BLOCK):
        last = min(first + BLOCK, cols)
        errors = torch.empty(rows, last - first, device=W.device)
        for j in range(first, last):
            at = slice(j, j + 1)
            Q[:, at] = to_grid(W[:, at], scale[:, at], zero[:, at], bits)
            errors[:, j - first] = (W[:, j] - Q[:, j]) / U[j, j]
            W[:, j:last] -= errors[:, j - first, None] * U[j, j:last]
        W[:, last:] -= errors @ U[first:last, last:]
    return torch.empty_like(Q).index_copy_(1, order, Q)


@torch.no_grad()
def gptq_model(model: nn.Module, tokens: Tensor, bits: int, group: int) -> float:
    """Rounds every linear of the decoder blocks in place -> stored bits per value; tokens [samples, n] are the calibration.

    Truly sequential: the Hessian of a linear is that of its inputs in the model whose linears before it are rounded already.
    """
    stream = BlockStream(model.eval(), None, type(model).__name__)
    device = next(model.parameters()).device
    stream.survey(tokens[:1], device)
    hidden = embed(model, stream.blocks, tokens)
    for block in stream.blocks:
        linears = stream.load(block)
        for stage in find_stages(block, linears, hidden[0]):
            members = {name: linears[name] for name in stage.names}
            hessians = collect(Stage(stage.names), members, block, hidden, {}, device).hessians
            for name, linear in members.items():
                weight = dense_weight(linear)
                weight.copy_(gptq(weight, hessians[name], bits, group))
        hidden = [block(state) for state in hidden]
        log(f"gptq int{bits} group {group}: {block.name}")
    stored = sum(rows * cols * bits_per_value(cols, bits, group) for rows, cols in stream.shapes.values())
    return stored / sum(rows * cols for rows, cols in stream.shapes.values())
