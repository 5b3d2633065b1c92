"""What bench.decode measures of a model's linears alone."""
from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gptvq.model import dense_weight, find_blocks, linears

from . import runner
from .contenders import READ, RING_BYTES, SETTLE, Contender, Shape, inputs

AS_CALLED = ", as in the model"


def blocks_linears(model: nn.Module, prompt: Tensor) -> dict[str, nn.Module]:
    """{name: linear} of the decoder blocks."""
    return {name: linear for block in find_blocks(model, prompt[None]) for name, linear in linears(block.module, block.name).items()}


def calls(model: nn.Module, prompt: Tensor, found: dict[str, nn.Module]) -> list[list[tuple[int, int]]]:
    """The shapes (rows, cols) of the linears in the order in which the model calls them, those together that get the same tensor."""
    groups, last = [], []

    def note(linear: nn.Module, args: tuple) -> None:
        if not last or last[-1] is not args[0]:
            groups.append([])
        groups[-1].append(tuple(dense_weight(linear).shape))
        last[:] = args[:1]

    hooks = [linear.register_forward_pre_hook(note) for linear in found.values()]
    try:
        with torch.no_grad():
            model(prompt[None])
    finally:
        for hook in hooks:
            hook.remove()
    return groups


@torch.inference_mode()
def compare_linears(groups: list[list[tuple[int, int]]], args, baselines: list[str], threads: int) -> list[dict]:
    """Rows for the `calls` of a model; those that cannot do every shape are left out."""
    shapes = Counter(shape for group in groups for shape in group)
    total = sum(rows * cols * count for (rows, cols), count in shapes.items())
    parts: dict[str, list[Contender]] = {}
    every = []
    for (rows, cols), count in shapes.items():
        def copies(nbytes: int, count: int = count, weights: int = rows * cols) -> int:
            return count * rounds(nbytes / weights * total)

        every.append(Shape(rows, cols, torch.device("cpu"), torch.bfloat16, copies))
        for one in every[-1].contenders(args.presets, args.activations, baselines, 1, threads, cold=True, alone=args.alone):
            parts.setdefault(one.name, []).append(one)
    parts = {name: ones for name, ones in parts.items() if len(ones) == len(shapes)}
    passing = {name: lambda ones=ones: [one.run() for one in ones] for name, ones in parts.items()}
    for name in [name for name, ones in parts.items() if ones[0].layers]:
        parts[name + AS_CALLED], passing[name + AS_CALLED] = parts[name], as_called(groups, dict(zip(shapes, parts[name])))
    times = runner.paired(passing, args.repeats, settle=SETTLE)
    passes = {name: sum(one.calls for one in ones) / shapes.total() for name, ones in parts.items()}
    times = {name: [seconds / passes[name] for seconds in found] for name, found in times.items()}
    rows = []
    for name, ones in parts.items():
        nbytes = sum(one.nbytes * count for one, count in zip(ones, shapes.values()))
        read = {"of_read": runner.ratio(times, name, ones[0].read)} if ones[0].read in times else {}
        rows.append({"operation": "linears of one token" + AS_CALLED * name.endswith(AS_CALLED), **ones[0].row, "format": plain(ones[0].row["format"]),
                     "bits_per_value": 8 * nbytes / total, "linears": shapes.total(), "device": "cpu", "threads": threads,
                     "cache": "cold", "median_seconds": statistics.median(times[name]),
                     "gb_per_second": nbytes / statistics.median(times[name]) / 1e9,
                     "speedup": ratios(times, name, [n for n in times if not n.startswith(("gptvq", READ))]), **read})
    for one in (one for ones in parts.values() for one in ones):
        one.close()
    for shape in every:
        shape.close()
    return rows


def as_called(groups: list[list[tuple[int, int]]], parts: dict[tuple[int, int], Contender]) -> Callable[[], None]:
    """A pass over all copies of a packed model's linears, each group of them on a tensor of its own."""
    rings = {shape: iter(one.layers) for shape, one in parts.items()}
    with torch.inference_mode(False):               # tensors of inference mode do not count their changes, and so share nothing
        x = {cols: [inputs(1, cols).bfloat16() for _ in range(2)] for _, cols in parts}
    copies = sum(len(one.layers) for one in parts.values()) // sum(map(len, groups))
    order = [(x[group[0][1]][at % 2], [next(rings[shape]) for shape in group]) for at, group in enumerate(groups * copies)]

    def run() -> None:
        for tokens, layers in order:
            for layer in layers:
                layer(tokens)

    run()                                           # learns who shares
    return run


def rounds(nbytes: float) -> int:
    """How many copies of a whole model's linears of `nbytes` bytes are cold in every pass."""
    return max(1, round(RING_BYTES / nbytes))


def plain(text: str) -> str:
    """A format without its group shape, which differs from layer to layer."""
    return " ".join(part for part in text.split() if "x" not in part)


def ratios(times: dict[str, list[float]], name: str, baselines: list[str]) -> dict[str, float]:
    return {baseline: runner.ratio(times, name, baseline) for baseline in baselines if baseline != name}
