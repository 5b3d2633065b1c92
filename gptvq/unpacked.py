"""The way of a packed linear that gradients take."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .spec import QuantSpec


class Unpacked(torch.autograd.Function):
    """F.linear with the dequantized weight, which is not kept for backward but unpacked again."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, spec: QuantSpec, *tables: Tensor | None) -> Tensor:
        ctx.spec, ctx.x_dtype, ctx.bias_dtype = spec, x.dtype, None if bias is None else bias.dtype
        if any(t is not None and t.is_inference() for t in tables):
            ctx.tables = tables                 # which cannot be saved, and count no changes
        else:
            ctx.save_for_backward(*tables)
        return F.linear(x, ops.dequantize(*tables, spec, x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        to_x = to_bias = None
        if ctx.needs_input_grad[0]:             # the product is in the type of the outputs, which autocast may have chosen
            weight = ops.dequantize(*(ctx.saved_tensors or ctx.tables), ctx.spec, ctx.x_dtype).to(grad.dtype)
            to_x = (grad @ weight).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            to_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
        return to_x, to_bias, *(None,) * 6
