"""Hessians whose tokens count by the gradient of the model's loss at a layer's output: tried, and measured here."""
from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptvq import drift, ops
from gptvq.hessian import Hessian
from gptvq.model import Stop, dense_weight

from .perplexity import found_linears


def loss_gradients(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """{linear: [samples, n] squared norms of the gradient of the summed next-token loss at its outputs}; tokens [samples, n]."""
    found: dict[str, list[Tensor]] = {name: [] for name in found_linears(model, tokens[0])}
    handles = [model.get_submodule(name).register_full_backward_hook(
        lambda m, into, out, kept=kept: kept.append(out[0].float().square().sum(-1).flatten())) for name, kept in found.items()]
    wanted = {p: p.requires_grad for p in model.parameters()}
    try:
        model.requires_grad_(False)
        for ids in tokens.to(next(model.parameters()).device):
            embedded = model.get_input_embeddings()(ids[None]).requires_grad_()
            with torch.enable_grad():
                logits = model(inputs_embeds=embedded, use_cache=False).logits
                F.cross_entropy(logits[0, :-1].float(), ids[1:], reduction="sum").backward()
    finally:
        for handle in handles:
            handle.remove()
        for p, was in wanted.items():
            p.requires_grad_(was)
    return {name: torch.stack(kept) for name, kept in found.items()}


@contextlib.contextmanager
def weighted(gradients: dict[str, Tensor], power: float) -> Iterator[None]:
    """Meanwhile quantize() weighs the tokens of each aligned stage by the mean over its linears of g / mean g, to this power."""
    def collect(stage, linears, block, hidden, wanted, device):
        if not stage.aligned:
            return plain(stage, linears, block, hidden, wanted, device)
        leader = stage.names[0]
        weights = sum(gradients[name] / gradients[name].mean() for name in stage.names).pow(power)
        roots = (weights / weights.mean()).sqrt().to(device)
        rows, cols = dense_weight(linears[leader]).shape
        hessian, moved = Hessian(cols, device), torch.zeros(rows if stage.summed else cols, cols, device=device)
        for root, state, want in zip(roots, hidden, wanted.pop(leader)):
            run = drift._Run({leader: linears[leader]}, until="sum" if stage.summed else "input")
            with contextlib.suppress(Stop), run:
                block(state.to(device))
            x = run.calls[0][1]
            have = run.sums[leader] if stage.summed else x
            x, change = (t.reshape(len(root), -1).float() * root[:, None] for t in (x, want.to(device) - have))
            hessian.add(x)
            ops.cross(moved, change, x)
        return drift.Inputs(dict.fromkeys(stage.names, hessian), stage.summed, moved * (2 / max(hessian.tokens, 1)))

    job = importlib.import_module("gptvq.quantize")         # gptvq.quantize by itself is the function
    plain = job.collect
    try:
        job.collect = collect
        yield
    finally:
        job.collect = plain
