"""tune(): the codebooks, scales, norms and biases of a packed model learn to give the dense model's outputs; indices and format stay."""
from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checkpoint
from .calibration import calibration_tokens, require_usable, tokens_sha256
from .embedding import TiedEmbedding, VQEmbedding
from .errors import ConfigError, NumericalError
from .evaluate import evaluating
from .learning import Learning
from .linear import VQLinear
from .storage import digest_of
from .verify import own_report

_CHUNK = 256                    # positions per float32 log-softmax
_ROUNDING = 1.05                # what rounding codebooks to int8 anew may do to a loss that no step has made less


class Losses(list[float]):
    """The loss of every step, each before that step and on other samples; `before` and `after` on the first step's, of the packed model."""

    before = after = float("nan")


def tune_folder(folder: str | os.PathLike, out: str | os.PathLike, dense: str | os.PathLike, *, calibration, samples: int = 256,
                sequence_length: int = 512, batch: int = 4, rate: float = 1e-3, device=None, overwrite: bool = False,
                progress: Callable[[int, int, float], None] | None = None) -> Losses:
    """Tunes the packed checkpoint in `folder` on the dense model `dense` and writes it into the folder `out` -> the losses.

    `calibration`, `samples`, `sequence_length`: the text to learn on, as for quantize().  The report goes along, with a warning that its
    layer errors are those before.  See `tune`; on an error nothing is written.
    """
    from .hf import open_dense, open_model, pick_device

    device, report = pick_device(device), own_report(folder)
    for source in (folder, dense):                          # proven before any work
        checkpoint.prepare(out, overwrite, source)
    checkpoint.require_space(Path(out), sum(file.stat().st_size for file in checkpoint.tensor_files(Path(folder))))
    model, tokenizer = open_model(folder, device)
    tokens = calibration_tokens(calibration, tokenizer, samples, sequence_length, seed=0)
    losses = tune(model, open_dense(dense)[0].to(device), tokens, batch=batch, rate=rate, progress=progress)
    packed = {name: module.packed for name, module in model.named_modules() if isinstance(module, VQLinear)}
    for record in report.layers:
        record.sha256 = digest_of(packed[record.name].buffers.values())
    report.warnings.append(f"codebooks, scales, norms and biases were tuned in {len(losses)} steps "
                           f"(KL {losses.before:.4f} -> {losses.after:.4f} on the first step's text); the layer errors are those before")
    report.calibration["tuned_on"] = {"tokens": tokens.numel(), "sha256": tokens_sha256(tokens), "rate": rate, "batch": batch}
    report.job, report.check = {}, {}               # it is no longer what that job gives
    checkpoint.save(model, tokenizer, Path(out), report)
    return losses


@torch.inference_mode(False)       # with gradients, whatever the caller has
def tune(model: nn.Module, dense: nn.Module, tokens: Tensor, *, batch: int = 4, rate: float = 1e-3,
         progress: Callable[[int, int, float], None] | None = None) -> Losses:
    """Trains `model` in place on tokens [samples, length], `batch` samples a step, once through -> the loss of every step.

    The loss is the mean KL divergence of the model's next-token distribution from the dense model's, in nats (Hinton et al.,
    arXiv 1503.02531, at temperature 1), both without dropout.  Adam; the rate rises over a tenth of the steps and falls to 0.  What
    learns: the codebooks and block scales of all packed linears but a head tied to the embedding, their biases, and parameters of one
    dimension, such as norms.  `progress(step, steps, loss)`.
    Raises ConfigError for a model without packed linears or of another vocabulary, and for tokens that it cannot take; NumericalError
    for a loss that is not finite, weights that cannot be stored, and where the packed model is afterwards further from the dense one on
    the first step's samples than it was, by more than rounding.  Whatever happens, the model is left packed, and
    as it was after a NumericalError.
    """
    if type(batch) is not int or batch < 1:
        raise ConfigError(f"batch: got {batch!r}, need a positive integer, for instance 4")
    tokens = calibration_tokens(tokens, None, 1, 1, seed=0)
    for one in (model, dense):
        require_usable(one, tokens)
    tied = {module.head for module in model.modules() if isinstance(module, TiedEmbedding)}
    layers = {name: module for name, module in model.named_modules()
              if isinstance(module, VQLinear) and not isinstance(module, VQEmbedding) and module not in tied}
    if not layers:
        raise ConfigError("tune: got a model without packed linears; quantize it first")
    steps, training, losses = tokens.split(batch), [(each, each.training) for each in (model, dense)], Losses()
    place = next(model.parameters()).device
    for each, _ in training:            # with dropout codebooks would learn to make up for noise that is not there afterwards
        each.eval()
    try:
        losses.before = _measured(model, dense, steps[0].to(place))
        with Learning(model, layers, len(steps), rate) as learning:
            for i, ids in enumerate(steps):
                ids = ids.to(place)
                with torch.no_grad():
                    target = dense(input_ids=ids, use_cache=False).logits
                loss = _divergence(target, model(input_ids=ids, use_cache=False).logits)
                losses.append(learning.step(loss, f"tune: the loss of step {i + 1}"))
                if progress is not None:
                    progress(i + 1, len(steps), losses[-1])
            learning.settle()
            losses.after = _measured(model, dense, steps[0].to(place))
            if not losses.after <= _ROUNDING * losses.before:
                raise NumericalError(f"tune: the KL to the dense model on the first step's samples rose from {losses.before:.6g} to "
                                     f"{losses.after:.6g}; try a smaller rate than {rate}, or more text")
    finally:
        for each, before in training:
            each.train(before)
    return losses


@torch.no_grad()
def _measured(model: nn.Module, dense: nn.Module, ids: Tensor) -> float:
    """The loss of the model as it is used."""
    with evaluating(model):
        return float(_divergence(dense(input_ids=ids, use_cache=False).logits, model(input_ids=ids, use_cache=False).logits))


def _divergence(target: Tensor, logits: Tensor) -> Tensor:
    """Mean over positions of KL(softmax target || softmax logits), [.., vocabulary] each."""
    if target.shape != logits.shape:
        raise ConfigError(f"tune: the dense model gives logits {tuple(target.shape)}, the packed one {tuple(logits.shape)}; they are not "
                          "the same model")
    target, logits = target.flatten(0, -2), logits.flatten(0, -2)
    parts = (F.kl_div(b.float().log_softmax(-1), a.float().log_softmax(-1), log_target=True, reduction="sum")
             for a, b in zip(target.split(_CHUNK), logits.split(_CHUNK)))
    return sum(parts) / len(target)
