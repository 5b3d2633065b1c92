"""An output head that stays dense in a packed model."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from . import ops


class DenseHead(nn.Linear):
    """nn.Linear whose product with one bfloat16 token on a CPU goes at the speed at which memory is read; F.linear takes up to twice as long.

    Sums are float32 as in F.linear, in another order.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_dynamo_compiling():
            from torch.fx.experimental.symbolic_shapes import guard_or_false        # takes a third of a second
            quick = not torch.is_grad_enabled() and self._fits(x) and all(guard_or_false(size == 1) for size in x.shape[:-1])
            return ops.matvec_operator(x, self.weight, self.bias) if quick else super().forward(x)
        if torch.compiler.is_compiling() or ops.watched(x) or not self._fits(x) or x.numel() != self.in_features:
            return super().forward(x)
        return ops.matvec(x, self.weight, self.bias)

    def _fits(self, x: Tensor) -> bool:
        """Whether neither gradients nor another dtype, device or kind of weight call for an operator of torch."""
        tensors = [x, self.weight] + [self.bias] * (self.bias is not None)
        return (x.ndim > 0 and x.shape[-1] == self.in_features
                and all(type(t) in ops.PLAIN and t.dtype == torch.bfloat16 and t.device.type == "cpu" for t in tensors)
                and not torch.is_autocast_enabled("cpu") and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)))


def quicken(model: nn.Module) -> nn.Module:
    """Makes the dense output head of `model`, if it has one, a DenseHead, with the same parameters -> the model."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if type(head) is nn.Linear:
        head.__class__ = DenseHead
    return model
