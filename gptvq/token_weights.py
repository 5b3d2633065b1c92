"""How much each calibration token counts in the Hessian of a layer: by the gradient of the model's loss at the layer's outputs."""
from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import NumericalError
from .model import Block, call

#: Of the gradients' squares: plain second order would take 1, by which a few tokens of a heavy tail outweigh all others.
POWER = 0.5


def loss_gradients(model: nn.Module, blocks: list[Block], names: Iterable[str], tokens: Tensor, device: torch.device,
                   progress: Callable[[int, int], None] = lambda done, of: None) -> dict[str, Tensor]:
    """{linear: [samples, n] float32 squared norms of the gradient of the next-token loss at its outputs}; tokens [samples, n].

    blocks: those of the model, with their recorded calls.  The loss is the negative log-likelihood of the sample's own tokens, summed.
    The model runs on `device` meanwhile, as a whole.  Linears that are not called once with a row per token (experts) are left out.
    Raises NumericalError for gradients that are not finite.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    calls: dict[str, int] = {}

    def watch(name: str, out: Tensor) -> None:
        calls[name] = calls.get(name, 0) + 1
        if out.requires_grad and out.shape[:-1].numel() == tokens.shape[1]:
            out.register_hook(lambda g: found[name].append(g.float().square().sum(-1).flatten()))

    def enter(module, args, kwargs):                            # the parameters are frozen: here the graph begins
        at = blocks[0].hidden_at
        if isinstance(at, int):
            return (*args[:at], args[at].detach().requires_grad_(), *args[at + 1:]), kwargs
        return args, {**kwargs, at: kwargs[at].detach().requires_grad_()}

    home, wanted = next(model.parameters()).device, {p: p.requires_grad for p in model.parameters()}
    handles = [model.get_submodule(name).register_forward_hook(lambda m, args, out, name=name: watch(name, out)) for name in found]
    handles.append(blocks[0].module.register_forward_pre_hook(enter, with_kwargs=True))
    try:
        model.to(device).requires_grad_(False)
        for i, ids in enumerate(tokens.to(device)):
            with torch.enable_grad():
                logits = call(model, ids[None]).logits
                F.cross_entropy(logits[0, :-1].float(), ids[1:], reduction="sum").backward()
            progress(i + 1, len(tokens))
    finally:
        for handle in handles:
            handle.remove()
        for p, was in wanted.items():
            p.requires_grad_(was)
        model.to(home)
    stacked = {name: torch.stack(kept) for name, kept in found.items() if len(kept) == len(tokens) == calls.get(name)}
    for name, gradients in stacked.items():
        if not bool(torch.isfinite(gradients).all()):
            raise NumericalError(f"{name}: the gradient of the loss at its outputs is not finite; try dtype bfloat16 or float32, or go without "
                                 "token weights")
    return stacked


def stage_weights(gradients: dict[str, Tensor], names: tuple[str, ...]) -> Tensor | None:
    """[samples, n] of mean 1, for linears that share an input: (the mean over them of g / mean g) ** POWER.

    None where some of them have no gradients, or none but zeros.
    """
    if any(name not in gradients or not float(gradients[name].mean()) > 0 for name in names):
        return None
    weights = sum(gradients[name] / gradients[name].mean() for name in names).pow(POWER)
    return weights / weights.mean()
