"""Sums over the calibration samples, in an order that does not depend on the number of processes.

The samples of a chunk are added up one by one, and the chunks in pairs: ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)).  A process adds
up what it has all chunks of; the rest of the tree is added up piece by piece, each process doing one slice of every piece.
"""
from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from . import ops, ranks
from .hessian import Counts, Hessian
from .ranks import CHUNKS, Samples

_PIECE = 1 << 24                    # elements that are exchanged at once
_Value = TypeVar("_Value")


@dataclass
class Sums:
    """Of some samples: flat sums, and their numbers of tokens and dropped tokens, by the first of the names that share one.

    `leaders` are {name: that first one}; a name that no sample had is missing.
    """

    leaders: dict[str, str] = field(default_factory=dict)
    flats: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Counts] = field(default_factory=dict)

    @classmethod
    def of(cls, leaders: dict[str, str], hessians: dict[str, Hessian]) -> Sums:
        """Of {leader: Hessian}, which is emptied, to hold only one of them twice at a time."""
        self = cls(dict(leaders))
        for name in list(hessians):
            hessian = hessians.pop(name)
            self.put(name, hessian.packed(), hessian.counts)
        return self

    def put(self, name: str, flat: Tensor, counts: Counts | None = None) -> None:
        free, whole = ops.free_bytes(flat.device) or (1, 1)
        # Where half of a GPU is in use, a mixture of experts has its Hessians there: their parts wait in the host's memory.
        self.flats[name], self.counts[name] = flat if 2 * free >= whole else flat.cpu(), counts or Counts()
        self.leaders[name] = name

    def hessians(self, cols: dict[str, int], device: torch.device) -> dict[str, Hessian]:
        """Of the linears in `cols`, {name: columns}; without tokens for those that are missing."""
        found: dict[str, Hessian] = {}
        for name, leader in self.leaders.items():
            if leader in cols and leader not in found:
                found[leader] = Hessian.from_packed(self.flats.pop(leader), cols[leader], device, self.counts[leader])
        return {name: found[self.leaders[name]] if name in self.leaders else Hessian(cols[name], device) for name in cols}


def summed(samples: Samples, sizes: dict[str, int], device: torch.device, chunk: Callable[[range], Sums]) -> Sums:
    """Over all samples, the same on every rank.

    chunk(places) gives the sums of some samples, places in this rank's share of them; `sizes` are the elements of all flat sums that there
    may be, in one order.  At most three sums wait while a chunk is worked on.
    """
    def leaf(span: tuple[int, int]) -> Sums | None:
        places = samples.of(span[0])
        return chunk(places) if len(places) else None

    single = [(i, i + 1) for i in range(CHUNKS)]
    mine = [_tree(span, single, leaf, _add) or Sums() for span in _spans(*samples.chunks[samples.mine])]
    return mine[0] if samples.parts == 1 else _exchanged(samples, sizes, device, mine)


def _exchanged(samples: Samples, sizes: dict[str, int], device: torch.device, mine: list[Sums]) -> Sums:
    """The sums of the whole tree, from those of the spans that ranks have."""
    number, spans = {name: i for i, name in enumerate(sizes)}, [_spans(*chunks) for chunks in samples.chunks]
    table = torch.full((max(map(len, spans)), len(sizes), 3), -1)
    for row, sums in zip(table, mine):
        for name, leader in sums.leaders.items():
            row[number[name]] = torch.tensor([number[leader], *sums.counts[leader].read()])
    tables = torch.cat([rows[: len(own)] for rows, own in zip(ranks.gather(table), spans)])
    total, groups, order = Sums(), {}, [span for own in spans for span in own]
    for name, i in number.items():
        seen = tables[:, i, 0] >= 0
        if bool(seen.any()):
            leader = total.leaders[name] = groups.setdefault(tuple(tables[:, i, 0].tolist()), name)
            if leader == name:
                present = [span for span, there in zip(order, seen.tolist()) if there]
                rows = [len(set(present) & set(own)) for own in spans]
                flats = [sums.flats[sums.leaders[name]] for sums in mine if name in sums.leaders]
                total.put(name, _added(flats, order, present, rows, sizes[name], device), Counts(*tables[seen, i, 1:].sum(0).tolist()))
    return total


def _added(flats: list[Tensor], spans: list[tuple[int, int]], present: list[tuple[int, int]], rows: list[int], size: int,
           device: torch.device) -> Tensor:
    """One flat sum, from those of this rank's spans; `present`: the `spans` of all ranks that have it, `rows` how many of each rank."""
    total, parts = torch.empty(size, device=device), len(rows)
    for first in range(0, size, _PIECE):
        piece = total[first: first + _PIECE]
        width = -(-len(piece) // parts)
        sent = torch.zeros(parts, len(flats), width, device=device)
        for i, flat in enumerate(flats):
            padded = torch.zeros(parts * width, device=device)
            padded[: len(piece)] = flat[first: first + _PIECE]
            sent[:, i] = padded.view(parts, width)
        slices = dict(zip(present, ranks.deal(sent, rows)))
        piece.copy_(torch.cat(ranks.gather(_tree((0, CHUNKS), spans, slices.get, torch.add)))[: len(piece)])
    return total


def _add(left: Sums, right: Sums) -> Sums:
    """Of neighbours; names share a sum that do so in both."""
    total, groups = Sums(), {}
    for name in dict.fromkeys([*left.leaders, *right.leaders]):
        pair = left.leaders.get(name), right.leaders.get(name)
        leader = total.leaders[name] = groups.setdefault(pair, name)
        if leader == name:
            both = [(sums.flats[own], sums.counts[own]) for sums, own in zip((left, right), pair) if own is not None]
            flat = both[0][0] if len(both) == 1 else both[0][0] + both[1][0].to(both[0][0].device)
            total.put(name, flat, sum((counts for _, counts in both), Counts()))
    return total


def _tree(span: tuple[int, int], leaves: Container[tuple[int, int]], value: Callable[[tuple[int, int]], _Value | None],
          add: Callable[[_Value, _Value], _Value]) -> _Value | None:
    """Adds up the values of the `leaves` of a span, [first, last) chunks, left before right; None where there are none."""
    if span in leaves:
        return value(span)
    middle = sum(span) // 2
    left, right = _tree((span[0], middle), leaves, value, add), _tree((middle, span[1]), leaves, value, add)
    return right if left is None else left if right is None else add(left, right)


def _spans(begin: int, end: int, first: int = 0, last: int = CHUNKS) -> list[tuple[int, int]]:
    """The largest spans of the tree that make up the chunks [begin, end)."""
    if begin <= first and last <= end:
        return [(first, last)]
    if last <= begin or end <= first:
        return []
    middle = (first + last) // 2
    return _spans(begin, end, first, middle) + _spans(begin, end, middle, last)
