"""What may have to see operators on a tensor, which kernels called past PyTorch's dispatcher would hide from it."""
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

PLAIN = (Tensor, nn.Parameter)
modes, tracing, level = torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state, torch._C._functorch.maybe_current_level


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, whose tensors have no memory or drop what is not an operator."""
    return level() is not None or forward_ad._current_level >= 0


def watched(x: Tensor) -> bool:
    """Whether something has to see operators on x: a tracer, a dispatch mode, a transformation, a type of x's own."""
    # `transformed` written out: this is asked on every call of a layer.  csrc/bind_call.cpp asks the same; change both.
    return type(x) not in PLAIN or modes() > 0 or tracing() is not None or level() is not None or forward_ad._current_level >= 0
