"""tune(): the codebooks, norms and biases of a packed model learn to give the dense model's outputs; indices and format stay."""
from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checkpoint, codebook, ops
from .calibration import calibration_tokens, tokens_sha256
from .embedding import TiedEmbedding, VQEmbedding
from .errors import ConfigError, NumericalError
from .linear import VQLinear
from .report import Report
from .scaling import scales_of
from .storage import digest_of
from .weight import VQWeight, unpack_scale_codes

_CHUNK = 256                    # positions per float32 log-softmax


class _Decode(torch.autograd.Function):
    """Centroids [row groups, strips, K, d] -> W [rows, vectors d], and the sums of W's gradient over each centroid's vectors back."""

    @staticmethod
    def forward(ctx, centroids, index, strip, scale, group_rows):
        ctx.save_for_backward(index, strip, scale)
        ctx.group_rows, ctx.shape = group_rows, tuple(centroids.shape[:3])
        return ops.decode(index, centroids, strip, scale, group_rows)

    @staticmethod
    def backward(ctx, grad):
        index, strip, scale = ctx.saved_tensors
        values = grad.float().view(*index.shape, -1)
        sums = ops.collect(index, values if scale is None else values * scale.unsqueeze(-1), strip, ctx.group_rows, ctx.shape)
        return sums.to(grad.dtype), None, None, None, None


class LearningLinear(nn.Module):
    """A packed linear with float codebooks that learn: `table` holds them in units of the largest entry that int8 and gs can store."""

    def __init__(self, layer: VQLinear):
        super().__init__()
        spec = layer.spec
        if spec.svd_rank:
            raise ConfigError(f"{layer.name}: SVD codebooks cannot be tuned; quantize with svd_rank=0")
        self.spec, self.name, self.buffers_before = spec, layer.name, layer.packed.buffers
        device = layer.idx.device
        self.index = layer.packed.codes()
        self.strip = torch.arange(spec.vectors, device=device) * spec.dim // spec.group_cols
        self.scale = None
        if spec.scale_block:
            block = torch.arange(spec.vectors, device=device) * spec.dim // spec.scale_block
            self.scale = scales_of(unpack_scale_codes(layer.sc, spec), layer.sz)[:, block].contiguous()
        self.unit = 127 * layer.gs.float()[..., None, None]
        self.table = nn.Parameter(layer.packed.codebook().transpose(2, 3).float() / 127)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        W = _Decode.apply(self.table * self.unit, self.index, self.strip, self.scale, self.spec.group_rows)
        return F.linear(x, W[:, : self.spec.cols].to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def frozen(self) -> VQLinear:
        """The packed linear with the codebooks as they are now, rounded to int8."""
        compressed = codebook.compress(self.table.detach() * self.unit)
        vq = VQWeight(self.spec, {**self.buffers_before, **compressed.tables, "gs": compressed.gs})
        return VQLinear.from_weight(vq, self.bias, self.name)


def tune_folder(folder: str | os.PathLike, out: str | os.PathLike, dense: str | os.PathLike, *, calibration, samples: int = 256,
                sequence_length: int = 512, batch: int = 4, rate: float = 1e-3, device=None, overwrite: bool = False,
                progress: Callable[[int, int, float], None] | None = None) -> list[float]:
    """Tunes the packed checkpoint in `folder` on the dense model `dense` and writes it into the folder `out` -> the losses.

    `calibration`, `samples`, `sequence_length`: the text to learn on, as for quantize().  The report goes along, with a warning that its
    layer errors are those before.  See `tune`; on an error nothing is written.
    """
    from .hf import open_dense, open_model, pick_device

    device = pick_device(device)
    checkpoint.prepare(out, overwrite, folder)              # proven before any work
    model, tokenizer = open_model(folder, device)
    tokens = calibration_tokens(calibration, tokenizer, samples, sequence_length, seed=0)
    losses = tune(model, open_dense(dense)[0].to(device), tokens, batch=batch, rate=rate, progress=progress)
    report = Report.load(folder)
    packed = {name: module.packed for name, module in model.named_modules() if isinstance(module, VQLinear)}
    for record in report.layers:
        record.sha256 = digest_of(packed[record.name].buffers.values())
    report.warnings.append(f"codebooks, norms and biases were tuned in {len(losses)} steps (KL {losses[0]:.4f} -> {losses[-1]:.4f} on the training "
                           "text); the layer errors are those before")
    report.calibration["tuned_on"] = {"tokens": tokens.numel(), "sha256": tokens_sha256(tokens), "rate": rate, "batch": batch}
    report.job, report.check = {}, {}               # it is no longer what that job gives
    checkpoint.save(model, tokenizer, Path(out), report)
    return losses


def tune(model: nn.Module, dense: nn.Module, tokens: Tensor, *, batch: int = 4, rate: float = 1e-3,
         progress: Callable[[int, int, float], None] | None = None) -> list[float]:
    """Trains `model` in place on tokens [samples, length], `batch` samples a step, once through -> the loss of every step.

    The loss is the mean KL divergence of the model's next-token distribution from the dense model's, in nats (Hinton et al.,
    arXiv 1503.02531, at temperature 1).  Adam; the rate rises over a tenth of the steps and falls to 0.  What learns: the
    codebooks of all packed linears but a head tied to the embedding, their biases, and parameters of one dimension, such as norms.  `progress(step, steps, loss)`.
    Raises ConfigError for a model without packed linears or of another vocabulary, NumericalError for a loss that is not finite;
    whatever happens, the model is left packed, and as it was after a NumericalError.
    """
    tied = {module.head for module in model.modules() if isinstance(module, TiedEmbedding)}
    layers = {name: module for name, module in model.named_modules() 
              if isinstance(module, VQLinear) and not isinstance(module, VQEmbedding) and module not in tied}
    if not layers:
        raise ConfigError("tune: got a model without packed linears; quantize it first")
    learners = {name: LearningLinear(layer) for name, layer in layers.items()}
    steps = tokens.split(batch)
    training, wanted = model.training, {p: p.requires_grad for p in model.parameters()}
    place = next(model.parameters()).device
    small, before, lost = [], [], False
    try:
        for name, learner in learners.items():
            model.set_submodule(name, learner)
        small = [p for p in model.parameters() if p.ndim == 1]
        before = [p.detach().clone() for p in small]
        for p in model.parameters():
            p.requires_grad_(p.ndim == 1)
        tables = [learner.table.requires_grad_() for learner in learners.values()]
        masters = [p.detach().float().requires_grad_() for p in small]      # bfloat16 parameters would swallow small steps
        optimizer = torch.optim.Adam([*tables, *masters], lr=rate, betas=(0.9, 0.95))
        warm = max(1, len(steps) // 10)
        plan = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / warm, (len(steps) - i) / len(steps)))
        losses = []
        model.train()
        for i, ids in enumerate(steps):
            ids = ids.to(place)
            with torch.no_grad():
                target = dense(input_ids=ids, use_cache=False).logits
            loss = _divergence(target, model(input_ids=ids, use_cache=False).logits)
            if not math.isfinite(loss.item()):
                raise NumericalError(f"tune: the loss of step {i + 1} is {loss.item()}; try a smaller rate than {rate}")
            loss.backward()
            for master, p in zip(masters, small):
                master.grad, p.grad = None if p.grad is None else p.grad.float(), None
            torch.nn.utils.clip_grad_norm_([*tables, *masters], 1.0)
            optimizer.step()
            plan.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for master, p in zip(masters, small):
                    p.copy_(master)
            losses.append(loss.item())
            if progress is not None:
                progress(i + 1, len(steps), losses[-1])
        return losses
    except NumericalError:
        lost = True
        raise
    finally:
        for name, learner in learners.items():
            model.set_submodule(name, layers[name] if lost else learner.frozen())
        for p, old in zip(small, before) if lost else ():
            p.data.copy_(old)
        model.train(training)
        for p in model.parameters():
            p.requires_grad_(wanted.get(p, False))
            p.grad = None


def _divergence(target: Tensor, logits: Tensor) -> Tensor:
    """Mean over positions of KL(softmax target || softmax logits), [.., vocabulary] each."""
    if target.shape != logits.shape:
        raise ConfigError(f"tune: the dense model gives logits {tuple(target.shape)}, the packed one {tuple(logits.shape)}; they are not "
                          "the same model")
    target, logits = target.flatten(0, -2), logits.flatten(0, -2)
    parts = (F.kl_div(b.float().log_softmax(-1), a.float().log_softmax(-1), log_target=True, reduction="sum")
             for a, b in zip(target.split(_CHUNK), logits.split(_CHUNK)))
    return sum(parts) / len(target)
