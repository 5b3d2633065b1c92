"""Tokens per second of a model, in turns with another."""
from __future__ import annotations

import statistics
from collections.abc import Callable

from . import runner

Decode = Callable[[list[int], int], tuple[list[int], float]]     # (prompt, new tokens) -> (their ids, tokens per second)


def speed(packed: Decode, dense: Decode, prompt: list[int], tokens: int, repeats: int) -> dict:
    """Tokens per second of both ways to decode.

    `speedup` is the median of the ratios within the rounds, which other load of the machine touches less than the speeds.
    """
    ways = {"packed": packed, "dense": dense}
    for way in ways.values():
        way(prompt, 2)                                  # the first run also allocates
    found = runner.turns({name: lambda way=way: way(prompt, tokens)[1] for name, way in ways.items()}, repeats)
    return {"tokens_per_second": statistics.median(found["packed"]), "dense_tokens_per_second": statistics.median(found["dense"]),
            "speedup": statistics.median(p / d for p, d in zip(found["packed"], found["dense"]))}
