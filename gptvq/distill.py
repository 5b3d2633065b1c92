"""Block-wise distillation: the codebooks, scales, norms and biases of a block learn together to give the dense block's output."""
from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .errors import ConfigError, NumericalError
from .job import Run
from .learning import Learning
from .linear import VQLinear
from .model import Block
from .spec import QuantSpec
from .storage import digest_of

RATE = 1e-3                     # of Adam, codebooks in units of their largest entry
_LEAST = 1e-12                  # of a token's squared norm, lest padding of zeros divide by zero


def require_learnable(specs: dict[str, QuantSpec]) -> None:
    """Raises ConfigError for formats that cannot learn, before any work is done."""
    for name, spec in specs.items():
        if spec.svd_rank:
            raise ConfigError(f"distill: {name} has SVD codebooks, which cannot learn; set svd_rank to 0, or leave distill at 0")


def learning_bytes(specs: Iterable[QuantSpec]) -> int:
    """Of the weights that learn: indices and scales, decoded values and gradients in float32 and in the model's dtype."""
    return sum(20 * spec.rows * spec.cols for spec in specs)


def distill_block(block: Block, packed: dict[str, VQLinear], hidden: Sequence[Tensor], dense: Sequence[Tensor],
                  run: Run) -> dict[str, VQLinear]:
    """Of a run: `distill` on the block whose linears were solved last -> its packed linears, noted in their records."""
    run.progress.stage("learning codebooks and norms")
    with run.timed("distill"):
        packed, errors = distill(block, packed, hidden, dense, run.config.recipe.distill, run.device)
    for record in run.report.layers[-len(packed):]:
        record.distilled, record.sha256 = list(errors), digest_of(packed[record.name].packed.buffers.values())
    return packed


def distill(block: Block, packed: dict[str, VQLinear], hidden: Sequence[Tensor], wanted: Sequence[Tensor], epochs: int,
            device: torch.device) -> tuple[dict[str, VQLinear], tuple[float, float]]:
    """-> (the linears as they have learnt, the error of the block's output before and after); norms learn in place.

    packed: those linears of the block that learn, by their names in the model.  hidden, wanted [1, tokens, width] per sample: what enters
    the block in the quantized stream, and what left it in the dense one.  A step takes one sample; all of them are gone through `epochs`
    times.  The error is the mean over tokens of |y - wanted|^2 / |wanted|^2, y the block's output: relative to each token, as the norm
    behind it reads it, lest the few huge tokens of a residual stream outweigh all others; tokens that the dense model has no finite values
    for do not count.  Where the error does not fall, or is not finite, all is as it was.
    """
    def error(place: int) -> Tensor:
        target = wanted[place].to(device).float()
        sound = torch.isfinite(target).all(-1)
        target, got = target[sound], block(hidden[place].to(device)).float()[sound]
        return ((got - target).square().sum(-1) / target.square().sum(-1).clamp_min(_LEAST)).sum() / sound.numel()

    def install(linears: dict[str, VQLinear]) -> float:
        for name, linear in linears.items():            # unpacked once, not for every sample
            block.module.set_submodule(name, linear.to_dense(dtypes[name]))
        return sum(float(error(place)) for place in range(len(hidden))) / len(hidden)

    inside = {name.removeprefix(block.name + "."): linear for name, linear in packed.items()}
    dtypes = {name: block.module.get_submodule(name).weight.dtype for name in inside}
    before, after, steps = install(inside), math.inf, epochs * len(hidden)
    with contextlib.suppress(NumericalError):               # it came to nothing, and all is as it was
        with Learning(block.module, inside, steps, RATE) as learning, torch.enable_grad():
            for i in range(steps):
                learning.step(error(i % len(hidden)), f"{block.name}: the error of its output in learning step {i + 1}")
        learnt = {name: block.module.get_submodule(name) for name in inside}
        after = install(learnt)
    if not after < before:
        learning.restore()
        install(inside)
        return packed, (before, before)
    return {f"{block.name}.{name}": linear for name, linear in learnt.items()}, (before, after)
