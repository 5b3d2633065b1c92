"""Packed linears whose codebooks and scales learn by gradients, while their indices and their format stay."""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import codebook, ops
from .errors import ConfigError, FormatError, NumericalError
from .linear import VQLinear
from .weight import VQWeight, unpack_scale_codes


class _Decode(torch.autograd.Function):
    """Centroids [row groups, strips, K, d], scale [rows, vectors] or None -> W [rows, vectors d].

    Back come the sums of W's gradient over each centroid's vectors, and over each vector's values.
    """

    @staticmethod
    def forward(ctx, centroids, index, strip, scale, group_rows):
        ctx.save_for_backward(centroids, index, strip, scale)
        ctx.group_rows = group_rows
        return ops.decode(index, centroids, strip, scale, group_rows)

    @staticmethod
    def backward(ctx, grad):
        centroids, index, strip, scale = ctx.saved_tensors
        values, pull = grad.float().view(*index.shape, -1), None
        if scale is not None:
            pull = (ops.decode(index, centroids, strip, None, ctx.group_rows).view_as(values) * values).sum(-1)
            values = values * scale.unsqueeze(-1)
        sums = ops.collect(index, values, strip, ctx.group_rows, tuple(centroids.shape[:3]))
        return sums.to(grad.dtype), None, None, pull, None


class LearningLinear(nn.Module):
    """A packed linear whose codebooks and block scales learn as floats.

    `table` holds the codebooks in units of the largest entry that int8 and gs can store, `sz` (z, a) of the block scales, or is None.
    """

    def __init__(self, layer: VQLinear):
        super().__init__()
        spec = layer.spec
        if spec.svd_rank:
            raise ConfigError(f"{layer.name}: SVD codebooks cannot learn; quantize with svd_rank=0")
        self.spec, self.name, self.buffers_before = spec, layer.name, layer.packed.buffers
        self.in_features, self.out_features = spec.cols, spec.rows
        device = layer.idx.device
        self.index = layer.packed.codes()
        self.strip = torch.arange(spec.vectors, device=device) * spec.dim // spec.group_cols
        self.sz = None
        if spec.scale_block:
            self.sz = nn.Parameter(layer.sz.float())
            self.block = torch.arange(spec.vectors, device=device) * spec.dim // spec.scale_block
            self.scale_codes = unpack_scale_codes(layer.sc, spec)
        self.table = nn.Parameter(layer.packed.codebook().transpose(2, 3).float() / 127)
        # A codebook of zeros has no scale that a step could be measured by: it stays.
        self.unit = 127 * layer.gs.float()[..., None, None] * (self.table.detach() != 0).any(3, keepdim=True).any(2, keepdim=True)
        bias = layer.bias                           # of its own: the given layer stays as it is
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)

    @property
    def scale(self) -> Tensor | None:
        """[rows, vectors] with a gradient: 2**(z + a * code), but for its last bits what `scaling.scale_table` gives."""
        if self.sz is None:
            return None
        z, a = self.sz.unbind(1)
        return torch.exp2(z + a * self.scale_codes)[:, self.block]

    @property
    def weight(self) -> Tensor:
        """[rows, cols] float32 with a gradient, also for code that reads a linear's weight."""
        return _Decode.apply(self.table * self.unit, self.index, self.strip, self.scale, self.spec.group_rows)[:, : self.spec.cols]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    @torch.no_grad()
    def keep_signs(self) -> None:
        """Of a signed format: entries that a step took below the least become the least, since their signs are in the indices."""
        if self.spec.signs:
            self.table.clamp_min_(self.spec.least_entry / 127)

    def frozen(self) -> VQLinear:
        """The packed linear with the codebooks as they are now, rounded to int8, and the scales, rounded to float16."""
        compressed = codebook.compress(self.table.detach() * self.unit, self.spec.least_entry)
        scales = {} if self.sz is None else {"sz": self.sz.detach().to(torch.float16)}
        vq = VQWeight(self.spec, {**self.buffers_before, **compressed.tables, "gs": compressed.gs, **scales})
        return VQLinear.from_weight(vq, self.bias, self.name)


class Learning:
    """Within it, LearningLinears are in the places of packed `layers` {name: module} of `model`; `step` has them learn.

    Adam; the rate rises over a tenth of the steps and falls to 0.  Parameters of one dimension learn too, such as norms and biases.
    Afterwards packed layers are there again, also after an error; after a NumericalError the given ones, and all else as it was.
    """

    def __init__(self, model: nn.Module, layers: dict[str, VQLinear], steps: int, rate: float):
        if not (math.isfinite(rate) and rate >= 0):
            raise ConfigError(f"rate: got {rate}, need a number from 0 up")
        self.model, self.layers, self.steps, self.rate = model, layers, steps, rate
        self.learners = {name: LearningLinear(layer) for name, layer in layers.items()}
        self.small: list[nn.Parameter] = []
        self._packed: dict[str, VQLinear] = {}
        self._wanted: dict[nn.Parameter, bool] = {}

    def __enter__(self) -> Learning:
        try:
            for name, learner in self.learners.items():
                self.model.set_submodule(name, learner)
            self._wanted = {p: p.requires_grad for p in self.model.parameters()}
            self.small = [p for p in self.model.parameters() if p.ndim == 1]
            self._before = [p.detach().clone() for p in self.small]
            for p in self.model.parameters():
                p.requires_grad_(False)
            for p in self.small:
                p.requires_grad_(True)
            tables = [p.requires_grad_() for learner in self.learners.values() for p in (learner.table, learner.sz) if p is not None]
            self._masters = [p.detach().float().requires_grad_() for p in self.small]       # bfloat16 parameters would swallow small steps
            self._all = [*tables, *self._masters]
            self._optimizer = torch.optim.Adam(self._all, lr=self.rate, betas=(0.9, 0.95))
            steps, warm = self.steps, max(1, self.steps // 10)                  # a `self` in the lambda would keep all of it alive
            self._plan = torch.optim.lr_scheduler.LambdaLR(self._optimizer, lambda i: min((i + 1) / warm, (steps - i) / steps))
        except BaseException as error:
            self.__exit__(type(error))
            raise
        return self

    def step(self, loss: Tensor, what: str) -> float:
        """Moves everything against the gradient of `loss` -> its value.  Raises NumericalError, naming `what`, where it is not finite."""
        value = loss.item()
        if not math.isfinite(value):
            raise NumericalError(f"{what} is {value}; try a smaller rate than {self.rate}")
        loss.backward()
        for master, p in zip(self._masters, self.small):
            master.grad, p.grad = None if p.grad is None else p.grad.float(), None
        nn.utils.clip_grad_norm_(self._all, 1.0)
        self._optimizer.step()
        for learner in self.learners.values():
            learner.keep_signs()
        self._plan.step()
        self._optimizer.zero_grad()
        with torch.no_grad():
            for master, p in zip(self._masters, self.small):
                p.copy_(master)
        return value

    def settle(self) -> None:
        """Ends learning: packed layers are in their places again.  Raises NumericalError where what was learnt cannot be stored."""
        advice = f"try a smaller rate than {self.rate}"
        for p in self.small:
            if not bool(torch.isfinite(p).all()):
                name = next(name for name, other in self.model.named_parameters() if other is p)
                raise NumericalError(f"{name}: values that learnt are not finite; {advice}")
        for name, learner in self.learners.items():
            self._packed[name] = learner.frozen()
            try:
                self._packed[name].check(name)
            except FormatError as error:
                raise NumericalError(f"{str(error).partition(';')[0]}: what was learnt cannot be stored; {advice}") from error
        for name, layer in self._packed.items():
            self.model.set_submodule(name, layer)

    def __exit__(self, kind, *_) -> None:
        lost = kind is not None and issubclass(kind, NumericalError)
        for p, was in self._wanted.items():
            p.requires_grad_(was)
            p.grad = None
        for name, learner in self.learners.items():
            self.model.set_submodule(name, self.layers[name] if lost else self._packed.get(name) or learner.frozen())
        if lost:
            self.restore()

    def restore(self) -> None:
        """Gives the parameters of one dimension the values that they had."""
        for p, old in zip(self.small, self._before):
            p.data.copy_(old)
