"""Perplexity the standard way, and decoding speed."""
from __future__ import annotations

import contextlib
import inspect
import math
import time

import torch
from torch import Tensor

from .calibration import text_config
from .errors import ConfigError, NumericalError

DEFAULT_WINDOW = 2048
_CHUNK = 64                     # positions per float32 log-softmax: 64 x 128k vocabulary = 33 MB


def default_window(model) -> int:
    """2048 tokens, or the most the model can see."""
    return min(DEFAULT_WINDOW, _positions(model) or DEFAULT_WINDOW)


def _positions(model) -> int | None:
    return getattr(text_config(model), "max_position_embeddings", None)


def learned_positions(model) -> int | None:
    """The most tokens of a model that looks its positions up in a table; None where they are computed, for any number."""
    most = _positions(model)
    tokens = model.get_input_embeddings() if most and hasattr(model, "get_input_embeddings") else None
    tables = (m.num_embeddings for m in model.modules() if isinstance(m, torch.nn.Embedding) and m is not tokens) if most else ()
    return most if any(most <= rows <= most + 2 for rows in tables) else None       # OPT's has two rows in front


def require_positions(model, count: int, what: str) -> None:
    """Raises ConfigError where `count` tokens are more than the model has learned positions for; `what` says what they are and what to do."""
    most = learned_positions(model)
    if most is not None and count > most:
        raise ConfigError(f"{what}; the model has learned {most} positions")


def perplexity(model, tokens: Tensor, window: int | None = None, max_windows: int | None = None, device=None,
               progress=None) -> float:
    """exp of the mean negative log-likelihood per predicted token, over non-overlapping windows of `window` tokens.

    tokens: int [n], the whole text tokenised at once; a last partial window is dropped, the first token of each window is
    context only.  The model is moved where `device` says, if given; `progress(windows done, of, perplexity so far)` is called
    after each window.  ConfigError: fewer tokens than one window, or a window of more tokens
    than the model can see.  NumericalError: a loss that is not finite.
    """
    parts = windows_of(tokens, default_window(model) if window is None else window, max_windows)
    windows, window = parts.shape
    _require_window(window, model)
    if device is not None:
        model.to(device)
    place = next(model.parameters()).device
    total = 0.0
    with evaluating(model):
        for i, ids in enumerate(parts):
            total += _nll(model, ids[None].to(place))
            if not math.isfinite(total):
                raise NumericalError(f"window {i + 1} of {windows}: the loss is {total}; the model's weights or activations "
                                     "overflow, try dtype bfloat16 or float32")
            if progress is not None:
                progress(i + 1, windows, _exp(total / (i + 1) / (window - 1)))
    return _exp(total / windows / (window - 1))


def windows_of(tokens: Tensor, window: int, max_windows: int | None = None) -> Tensor:
    """int [n] -> [windows, window], at most `max_windows`; a last partial window is dropped.  ConfigError: none fits, or a bad number."""
    if window < 2:
        raise ConfigError(f"window: got {window}, need at least 2 tokens")
    if max_windows is not None and max_windows < 1:
        raise ConfigError(f"max_windows: got {max_windows}, need at least 1")
    tokens = torch.as_tensor(tokens).flatten()
    windows = min(len(tokens) // window, max_windows or len(tokens))
    if windows == 0:
        raise ConfigError(f"text of {len(tokens)} tokens is shorter than one window of {window}: give a longer text, or a smaller "
                          "window")
    return tokens[: windows * window].view(windows, window)


def _require_window(window: int, *models) -> None:
    for model in models:
        require_positions(model, window, f"window: got {window} tokens, need a smaller one")


@contextlib.contextmanager
def evaluating(*models):
    """Evaluation mode, and afterwards what it was."""
    training = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for model, was in zip(models, training):
            model.train(was)


@torch.inference_mode()
def agreement(model, dense, tokens: Tensor, window: int | None = None, max_windows: int | None = None, progress=None) -> dict[str, float]:
    """How far `model` is from `dense`, on the windows that `perplexity` would take: means over all predicted tokens.

    {"kl": KL(dense || model) in nats, "top1": share of tokens for which both find the same one likeliest, "perplexity",
    "dense_perplexity", "windows", "window"}.  Each model runs where it is.  ConfigError: different vocabularies.  NumericalError: a
    divergence that is not finite.
    """
    parts = windows_of(tokens, default_window(dense) if window is None else window, max_windows)
    _require_window(parts.shape[1], model, dense)
    total = torch.zeros(4, dtype=torch.float64)
    with evaluating(model, dense):
        for i, ids in enumerate(parts):
            ours, theirs = (one(input_ids=ids[None].to(next(one.parameters()).device), use_cache=False).logits[0, :-1].cpu()
                            for one in (model, dense))
            if ours.shape != theirs.shape:
                raise ConfigError(f"the models' vocabularies differ: got {ours.shape[-1]} and {theirs.shape[-1]} tokens, need the dense "
                                  "model that was quantized")
            for q, p, target in zip(ours.split(_CHUNK), theirs.split(_CHUNK), ids[1:].cpu().split(_CHUNK)):
                q, p = q.float().log_softmax(-1), p.float().log_softmax(-1)
                nll = (-one.gather(1, target[:, None]).sum(dtype=torch.float64) for one in (q, p))
                total += torch.stack([(p.exp() * (p - q)).sum(dtype=torch.float64), (p.argmax(-1) == q.argmax(-1)).sum().double(), *nll])
            if not bool(torch.isfinite(total).all()):
                raise NumericalError(f"window {i + 1} of {len(parts)}: the divergence is {float(total[0])}; a model's weights or activations "
                                     "overflow, try dtype bfloat16 or float32")
            if progress is not None:
                progress(i + 1, len(parts), float(total[0]) / (i + 1) / (parts.shape[1] - 1))
    kl, same, ours, theirs = (total / parts.shape[0] / (parts.shape[1] - 1)).tolist()
    return {"kl": kl, "top1": same, "perplexity": _exp(ours), "dense_perplexity": _exp(theirs), "windows": parts.shape[0],
            "window": parts.shape[1]}


@torch.inference_mode()
def _nll(model, ids: Tensor) -> float:
    """Summed negative log-likelihood of ids[0, 1:] given what precedes each, [1, n] ids."""
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    target = ids[0, 1:]
    chunks = (torch.nn.functional.cross_entropy(part.float(), target[i * _CHUNK:][: len(part)], reduction="sum")
              for i, part in enumerate(logits.split(_CHUNK)))
    return float(sum(chunk.double() for chunk in chunks))


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


@torch.inference_mode()
def decode(model, prompt: Tensor, new_tokens: int) -> tuple[list[int], float]:
    """(`new_tokens` ids that follow the prompt, tokens per second): greedy, batch 1, with a cache; the prompt is not timed.

    prompt: int [n] ids.  The speed is that of the `new_tokens - 1` steps after the first; an end-of-text token does not stop it.
    """
    ids = torch.as_tensor(prompt).view(1, -1).to(next(model.parameters()).device)
    if ids.numel() == 0 or new_tokens < 2:
        raise ConfigError(f"got a prompt of {ids.numel()} tokens and {new_tokens} new tokens, need at least 1 and 2")
    require_positions(model, ids.numel() + new_tokens - 1, f"got a prompt of {ids.numel()} tokens and {new_tokens} new tokens, need fewer")
    out = model(input_ids=ids, use_cache=True)
    token = out.logits[:, -1:].argmax(-1)
    found = [int(token)]                        # reading it also waits for a GPU
    given, taken = _cache_names(model, out)
    began = time.perf_counter()
    while len(found) < new_tokens:
        out = model(input_ids=token, **{taken: getattr(out, given)}, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        found.append(int(token))
    return found, (new_tokens - 1) / (time.perf_counter() - began)


def _cache_names(model, out) -> tuple[str, str]:
    """What the cache is called in `out` and as an argument: `cache` from transformers 5.24 on, `past_key_values` before and in older code."""
    given = "past_key_values" if getattr(out, "cache", None) is None else "cache"
    return given, "past_key_values" if "past_key_values" in inspect.signature(model.forward).parameters else given


def tokens_per_second(model, prompt: Tensor, new_tokens: int = 32) -> float:
    """Greedy decoding speed after the prompt, int [n] ids, batch 1."""
    return decode(model, prompt, new_tokens)[1]


@torch.inference_mode()
def divergence(dense: Tensor, model, tokens: Tensor) -> dict[str, float]:
    """How far `model` is from the one whose logits [samples, n, vocabulary] for `tokens` [samples, n] are `dense`.

    {"kl": mean KL(dense || model) per token in nats, "same_token": share of positions with the same likeliest token, "tokens"}.
    Raises NumericalError for a divergence that is not finite.
    """
    place = next(model.parameters()).device
    kl, same = sum(_distance(want, model(input_ids=ids[None].to(place), use_cache=False).logits[0].cpu())
                   for ids, want in zip(tokens, dense)).tolist()
    count = tokens.numel()
    if not math.isfinite(kl):
        raise NumericalError(f"the divergence from the dense model on {count} tokens is {kl}; the model's weights or activations overflow, "
                             "try dtype bfloat16 or float32")
    return {"kl": kl / count, "same_token": same / count, "tokens": count}


def _distance(dense: Tensor, logits: Tensor) -> Tensor:
    """float64 [2]: the sum of KL(dense || logits) over positions [n, vocabulary], and how many have the same likeliest token."""
    total = torch.zeros(2, dtype=torch.float64)
    for p, q in zip(dense.split(_CHUNK), logits.split(_CHUNK)):
        p, q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        total += torch.stack([(p.exp() * (p - q)).sum(dtype=torch.float64), (p.argmax(-1) == q.argmax(-1)).sum().double()])
    return total


def divergence_bytes(positions: int, vocabulary: int, itemsize: int) -> int:
    """Bytes that `divergence` holds at most beside the model and `dense`: a sample's logits, and five float32 chunks of them."""
    return vocabulary * (positions * itemsize + 5 * 4 * min(positions, _CHUNK))
