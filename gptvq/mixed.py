"""Mixed precision: the preset of every layer that spends a budget of bytes on the least rise of the model's loss."""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
import statistics
from collections import Counter
from collections.abc import Collection, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Recipe, VQConfig
from .errors import ConfigError, NumericalError
from .head import skipped
from .model import Block, InputCollector, call, dense_weight, embed, in_list
from .report import Progress, size
from .solver import solve
from .spec import QuantSpec
from .stream import BlockStream

CANDIDATES = ("2d-2.25-s64", "4d-2.125-s64", "2d-3.125-s64", "4d-3.125-s64", "2d-4.125-s64")
#: Short, for errors whose ratios between presets and layers are those of the whole recipe.
PROXY = Recipe(em_iterations=10, em_starts=1, passes=1, sweeps=0, cg_iterations=2, compensate=0)
_MOST_CELLS = 100_000_000           # layers x sizes up to which the best choice is computed exactly
_MOST_SIZES = 1 << 20


def candidates(config: VQConfig, presets: Sequence[str], shapes: dict[str, tuple[int, int]]) -> dict[str, dict[str | None, QuantSpec]]:
    """{layer: {preset: its format}} of all layers but those that rules of `config` leave alone.

    Where another rule of `config` matches, it is the only choice, called None.  Presets that do not fit a layer are none for it.
    """
    formats = {preset: VQConfig.preset(preset) for preset in presets}
    fixed = config.resolve(shapes)
    found: dict[str, dict[str | None, QuantSpec]] = {}
    for name in fixed:
        if config.rule(name) is not None:
            found[name] = {None: fixed[name]}
            continue
        found[name], problem = {}, ConfigError("presets: got none, need some to choose from")
        for preset, chosen in formats.items():
            try:
                found[name][preset] = chosen.spec(*shapes[name], name)
            except ConfigError as error:
                problem = error
        if not found[name]:
            raise problem
    return found


@torch.no_grad()
def sensitivities(stream: BlockStream, tokens: Tensor, choices: dict[str, dict], device: torch.device,
                  progress: Progress) -> dict[str, dict[str | None, float]]:
    """{layer: {preset: relative layer error}} by a short recipe, with Hessians of the dense model on `tokens` [samples, n].

    The stream is one that was surveyed; one block at a time is loaded.
    """
    hidden, errors = embed(stream.model, stream.blocks, tokens), {}
    for index, block in enumerate(stream.blocks):
        progress.stage(f"errors of block {index + 1} of {len(stream.blocks)}")
        with stream.loaded(block, device) as found:
            names = {full: linear for full, linear in found.items() if full in choices}
            with InputCollector(names, device) as inputs:
                for i, state in enumerate(hidden):
                    hidden[i] = block(state.to(device)).to(state.device)
                    inputs.next_sample()
            hessians = inputs.finish(block)
            for name, linear in names.items():
                weight, specs = dense_weight(linear).float(), choices[name]
                errors[name] = {preset: 0.0 if len(specs) == 1 else solve(weight, hessians[name], spec, PROXY, name)[1].error
                                for preset, spec in specs.items()}
    return errors


@torch.no_grad()
def loss_shares(stream: BlockStream, tokens: Tensor, names: Collection[str], device: torch.device, progress: Progress) -> dict[str, float]:
    """{linear: what a relative error of 1 in its outputs adds to the loss per token, in nats}, from gradients on `tokens` [samples, n].

    For an output y_t of d values with the loss gradient g_t, and an error of the size |y_t| in no direction that g_t prefers, it is the
    mean over the tokens of 1/2 |g_t|^2 |y_t|^2 / d: the second order of the loss with the Fisher matrix in the Hessian's place (as Amari,
    Neural Computation 10, 1998), and layers that do not see each other's errors.  The loss is the negative log-likelihood of the text.
    Members of a ModuleList that no token reached, as experts, count like the mean of the others at their place.  Empty for a model
    that gives no logits, and for single tokens.
    The stream is one that was surveyed; one block at a time is loaded, first forwards and then back, and runs on `device`.  The hidden
    states between all blocks are in memory meanwhile.
    """
    blocks, hidden, behind = stream.blocks, embed(stream.model, stream.blocks, tokens), []
    entered: list[list[Tensor]] = []
    for index, block in enumerate(blocks):
        progress.stage(f"loss gradients: block {index + 1} of {len(blocks)} forwards")
        entered.append(hidden)
        with stream.loaded(block, device):
            hidden = [block(state.to(device)).to(state.device) for state in hidden]
    for ids, state in zip(tokens, hidden):
        state.requires_grad_()
        with torch.enable_grad(), skipped(blocks, state):
            logits = getattr(call(stream.model, ids[None]), "logits", None)
            if logits is None or len(ids) < 2:
                return {}
            loss = F.cross_entropy(logits[0, :-1].float(), ids[1:].to(logits.device), reduction="sum")
            behind += torch.autograd.grad(loss, state)
    shares: dict[str, float] = {}
    for index, block in reversed(list(enumerate(blocks))):
        progress.stage(f"loss gradients: block {index + 1} of {len(blocks)} backwards")
        with stream.loaded(block, device) as found, _frozen(block.module):
            watched = {name: linear for name, linear in found.items() if name in names}
            sums = {name: torch.zeros((), device=device) for name in watched}
            handles = [linear.register_forward_hook(functools.partial(_weigh, sums, name)) for name, linear in watched.items()]
            try:
                for i, state in enumerate(entered.pop()):
                    state = state.to(device).requires_grad_()
                    with torch.enable_grad():
                        behind[i] = torch.autograd.grad(block(state), state, behind[i].to(device))[0].to(behind[i].device)
            finally:
                for handle in handles:
                    handle.remove()
            own = {name: float(total) / (2 * dense_weight(found[name]).shape[0] * tokens.numel()) for name, total in sums.items()}
            for name, share in own.items():
                if not math.isfinite(share):
                    raise NumericalError(f"{name}: the gradient of the loss at its outputs is not finite; try dtype bfloat16 or float32")
            shares |= _filled_up(block, own)
    return shares


def _filled_up(block: Block, shares: dict[str, float]) -> dict[str, float]:
    """Shares of 0 among members of a ModuleList are not known: those get the mean of the others at the same place."""
    alike: dict[str, list[float]] = {}
    place = {name: re.sub(r"\.\d+\.", ".*.", name.removeprefix(block.name)) for name in shares if in_list(block, name)}
    for name, at in place.items():
        alike.setdefault(at, []).extend([shares[name]] if shares[name] else [])
    return {name: share or statistics.mean(alike.get(place.get(name), ()) or (0.0,)) for name, share in shares.items()}


def _weigh(sums: dict[str, Tensor], name: str, module, args, y: Tensor) -> None:
    """A forward hook that has the backward pass add sum_t |g_t|^2 |y_t|^2."""
    size = y.detach().float().square().sum(-1)

    def add(g: Tensor) -> None:
        sums[name] += (g.float().square().sum(-1) * size).sum()

    if y.requires_grad:
        y.register_hook(add)


@contextlib.contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Within it no parameter wants a gradient."""
    wanted = {p: p.requires_grad for p in module.parameters()}
    try:
        module.requires_grad_(False)
        yield
    finally:
        for p, was in wanted.items():
            p.requires_grad_(was)


def check_budget(choices: dict[str, dict[str | None, QuantSpec]], budget: int, rest: int,
                 packed: Sequence[QuantSpec] = ()) -> None:
    """Raises ConfigError for a budget in bytes that no choice can meet, naming what is possible.

    packed: formats of what is packed in any case, which the budget does not pay for; rest: bytes of all other tensors.
    """
    least, most = (sum(pick(spec.nbytes for spec in specs.values()) for specs in choices.values()) for pick in (min, max))
    weights = sum(spec.rows * spec.cols for spec in (*packed, *(next(iter(specs.values())) for specs in choices.values())))

    def amount(nbytes: int) -> str:
        nbytes += sum(spec.nbytes for spec in packed)
        return f"{8 * nbytes / weights:.4f} bits per value ({nbytes:,} bytes, {size(nbytes + rest)} with all other tensors)"

    if not least <= budget <= most:
        raise ConfigError(f"target: got {amount(budget)}, possible with these presets are {amount(least)} to {amount(most)}; choose a "
                          "target in between, or other presets")


def within_budget(config: VQConfig, choices: dict[str, dict[str | None, QuantSpec]], errors: dict[str, dict[str | None, float]],
                  shares: dict[str, float], budget: int) -> VQConfig:
    """`config` with rules for all layers, so that their formats take at most `budget` bytes, with the least sum of shares times errors.

    Layers without a share count 1.
    """
    names = list(choices)
    sizes = [[spec.nbytes for spec in choices[name].values()] for name in names]
    picked = choose(sizes, [[shares.get(name, 1.0) * error for error in errors[name].values()] for name in names], budget)
    chosen = {name: list(choices[name])[j] for name, j in zip(names, picked) if None not in choices[name]}
    if not chosen:
        return config
    base = Counter(chosen.values()).most_common(1)[0][0]
    rules = ((name.replace("[", "[[]"), preset) for name, preset in chosen.items() if preset != base)
    return dataclasses.replace(config, rules=(*config.rules, *rules, ("*", base)))


def choose(sizes: list[list[int]], errors: list[list[float]], budget: int) -> list[int]:
    """One choice per layer with the sum of sizes <= budget and the least sum of errors (multiple-choice knapsack).

    Exact by dynamic programming where layers times distinct sizes allow; else greedily along the convex hulls, at most one choice from
    the optimum of the relaxation.  The budget must allow the smallest choices.
    """
    least = [min(row) for row in sizes]
    room = min(budget - sum(least), sum(map(max, sizes)) - sum(least))
    if room < 0:
        raise ConfigError(f"budget: got {budget} bytes, need at least {sum(least)}")
    unit = math.gcd(*(s - low for row, low in zip(sizes, least) for s in row)) or 1
    cells = room // unit + 1
    if cells <= _MOST_SIZES and cells * len(sizes) <= _MOST_CELLS:
        return _exact([[(s - low) // unit for s in row] for row, low in zip(sizes, least)], errors, cells)
    return _greedy(sizes, errors, budget)


def _exact(extra: list[list[int]], errors: list[list[float]], cells: int) -> list[int]:
    import numpy as np

    best, taken = np.zeros(cells), np.zeros((len(extra), cells), dtype=np.uint16)
    for i, (row, error) in enumerate(zip(extra, errors)):
        total = np.full(cells, np.inf)
        for j, (w, e) in enumerate(zip(row, error)):
            if w < cells:
                candidate = best[: cells - w] + e
                better = candidate < total[w:]
                total[w:][better] = candidate[better]
                taken[i, w:][better] = j
        best = total
    picked, at = [], cells - 1
    for i in reversed(range(len(extra))):
        picked.append(int(taken[i, at]))
        at -= extra[i][picked[-1]]
    return picked[::-1]


def _greedy(sizes: list[list[int]], errors: list[list[float]], budget: int) -> list[int]:
    picked = [min(range(len(row)), key=lambda j: (row[j], error[j])) for row, error in zip(sizes, errors)]
    left = budget - sum(row[j] for row, j in zip(sizes, picked))
    steps = []
    for i, (row, error) in enumerate(zip(sizes, errors)):
        at = picked[i]
        while True:                                     # the next corner of the lower convex hull
            ahead = [j for j in range(len(row)) if row[j] > row[at] and error[j] < error[at]]
            if not ahead:
                break
            to = max(ahead, key=lambda j: ((error[at] - error[j]) / (row[j] - row[at]), row[j]))
            steps.append(((error[at] - error[to]) / (row[to] - row[at]), i, at, to))
            at = to
    for _, i, at, to in sorted(steps, key=lambda step: (-step[0], step[1], sizes[step[1]][step[3]])):
        if picked[i] == at and sizes[i][to] - sizes[i][at] <= left:
            left -= sizes[i][to] - sizes[i][at]
            picked[i] = to
    while True:                                         # what is left buys whatever it can
        gain, i, to = max(((errors[i][picked[i]] - errors[i][j], i, j) for i in range(len(sizes)) for j in range(len(sizes[i]))
                           if sizes[i][j] - sizes[i][picked[i]] <= left), default=(0, 0, 0))
        if gain <= 0:
            return picked
        left -= sizes[i][to] - sizes[i][picked[i]]
        picked[i] = to
