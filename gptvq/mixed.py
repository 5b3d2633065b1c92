"""Mixed precision: the preset of every layer that spends a budget of bytes on the least summed layer error."""
from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from .config import Recipe, VQConfig
from .errors import ConfigError
from .model import InputCollector, dense_weight, embed
from .report import Progress, size
from .solver import solve
from .spec import QuantSpec
from .stream import BlockStream

CANDIDATES = ("2d-2.25-s64", "2d-3.125-s64", "2d-4.125-s64")
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


def check_budget(choices: dict[str, dict[str | None, QuantSpec]], budget: int, rest: int) -> None:
    """Raises ConfigError for a budget in bytes that no choice can meet, naming what is possible; `rest`: bytes of all other tensors."""
    least, most = (sum(pick(spec.nbytes for spec in specs.values()) for specs in choices.values()) for pick in (min, max))
    weights = sum(spec.rows * spec.cols for specs in choices.values() for spec in list(specs.values())[:1])

    def amount(nbytes: int) -> str:
        return f"{8 * nbytes / weights:.4f} bits per value ({nbytes:,} bytes, {size(nbytes + rest)} with all other tensors)"

    if not least <= budget <= most:
        raise ConfigError(f"target: got {amount(budget)}, possible with these presets are {amount(least)} to {amount(most)}; choose a "
                          "target in between, or other presets")


def within_budget(config: VQConfig, choices: dict[str, dict[str | None, QuantSpec]], errors: dict[str, dict[str | None, float]],
                  budget: int) -> VQConfig:
    """`config` with rules for all layers, so that their formats together take at most `budget` bytes, with the least summed error."""
    names = list(choices)
    sizes = [[spec.nbytes for spec in choices[name].values()] for name in names]
    picked = choose(sizes, [list(errors[name].values()) for name in names], budget)
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
