"""y = W x by CUDA kernels that read the packed weight."""
from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..config import ACTIVATIONS
from ..errors import BackendUnavailable, ConfigError
from ..spec import QuantSpec
from . import cuda_call
from .cuda_call import call, dense

_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_MODES = {name: code for code, name in enumerate(ACTIVATIONS)}
_FP16 = len(_MODES)
_ALIGNMENT = 16                     # bytes, of the tensors that kernels read


class PreparedLinear:
    """f(x, activations) on a GPU: keeps the packed tensors alive and the kernels' view of them.

    A call queues kernels on torch's current stream and allocates nothing but its outputs and scratch memory, so that a CUDA graph can
    capture it.  Up to `most_tokens` tokens at once are multiplied with the packed weight, more with the weight unpacked.  Where
    `GPTVQ_CUDA_LINEAR` is "fp16" when it is made, products are those of float16 instead of integers, to compare the two.
    `views`, if given, remembers the view of each `idx`, which is of addresses alone.
    """

    joins = True                        # each launch that is saved counts

    def __init__(self, idx, cb, gs, sc, table, bias, spec: QuantSpec, views: WeakTensorKeyDictionary | None = None):
        self.spec, self.rows, self.device = spec, spec.rows, idx.device
        self.fields = tuple(spec.to_dict().values())[:7]
        self.packed = [dense(None if t is None else t.detach(), _ALIGNMENT) for t in (idx, cb, gs, sc, table)]
        self.bias = None if bias is None else bias.detach().float().contiguous()
        self.modes = {**_MODES, **_chosen()}
        if views is None:
            self.kernel = call("Linear", *self.packed, self.bias, self.fields)
            return
        of = self.fields, [None if t is None else (t.data_ptr(), t.dtype) for t in (*self.packed, self.bias)]
        known = views.get(idx)
        if known is None or known[0] != of:
            known = views[idx] = of, call("Linear", *self.packed, self.bias, self.fields)
        self.kernel = known[1]

    def __call__(self, x: Tensor, activations: str) -> Tensor:
        if x.numel() > self.spec.cols * cuda_call.kernels.most_tokens:
            self._check(x)
            weight = cuda_call.empty(self.rows, self.spec.cols, dtype=x.dtype, device=self.device)
            call("dequantize", *self.packed, weight, self.fields)
            return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))
        return self.together([], x, activations)[0]

    def together(self, others: list[PreparedLinear], x: Tensor, activations: str) -> list[Tensor]:
        """The outputs of this layer and of others with as many columns for a few tokens x, in as few launches as their formats allow."""
        layers = [self, *others]
        for layer in layers:
            layer._check(x)
        x, device, kernels = x.contiguous(), self.device, cuda_call.kernels
        tokens, mode, index = x.numel() // self.spec.cols, self.modes[activations], device.index or 0
        handles = [layer.kernel for layer in layers]
        try:
            size = kernels.linear_scratch(handles, tokens, mode, index)
            scratch = cuda_call.empty(size, dtype=torch.uint8, device=device)
            outputs = [cuda_call.empty(*x.shape[:-1], layer.rows, dtype=x.dtype, device=device) for layer in layers]
            with cuda_call.on(device):
                kernels.linear(handles, x.data_ptr(), _TYPES[x.dtype], tokens, [y.data_ptr() for y in outputs], mode, scratch.data_ptr(),
                               size, index, cuda_call.stream(device))
        except ValueError as error:
            raise ConfigError(f"linear: {error}") from None
        except RuntimeError as error:
            raise BackendUnavailable(f"linear on {device}: {error}") from None
        return outputs

    def turn(self) -> tuple | None:
        """What a result is ordered by: the stream, and whether its work runs or is captured.  None by the emulator."""
        return (cuda_call.stream(self.device), torch.cuda.is_current_stream_capturing()) if self.device.type == "cuda" else None

    def _check(self, x: Tensor) -> None:
        if x.device != self.device:
            raise ConfigError(f"linear: got x on {x.device} and a weight on {self.device}, need both on one device")


def _chosen() -> dict[str, int]:
    """What GPTVQ_CUDA_LINEAR puts in the place of integers."""
    choice = os.environ.get("GPTVQ_CUDA_LINEAR", "")
    if choice not in ("", "fp16"):
        raise BackendUnavailable(f"GPTVQ_CUDA_LINEAR={choice!r} is unknown; set it to fp16, or unset it")
    return {"a16": _FP16, "a8": _FP16} if choice else {}


_views = WeakTensorKeyDictionary()


def linear(x: Tensor, idx: Tensor, cb: Tensor, gs: Tensor, sc: Tensor | None, table: Tensor | None, bias: Tensor | None, spec: QuantSpec,
           activations: str) -> Tensor:
    """The operator.  No tensor outlives the call: in a compiled graph it may lie in the memory of a CUDA graph, which others reuse."""
    return PreparedLinear(idx, cb, gs, sc, table, bias, spec, _views)(x, activations)


prepare_linear = PreparedLinear
