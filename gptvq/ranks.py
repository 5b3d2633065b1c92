"""One job on several processes, on torch.distributed: process groups of torchrun or of the caller, nothing of our own.

The calibration samples are shared out in chunks, and rows, which are independent given the Hessian, at the borders of a layer's
groups.  All that ranks tell each other is exact, whoever says it first: pieces put together in the order of ranks, and sums
that any number of processes adds up in one order (`sums`).  So the result is that of one process, byte by byte, for any number of them,
on CPUs, whose products give the same bits for any number of rows.  The libraries of a GPU may sum in another order where a matrix has
other rows.
"""
from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import GptvqError
from .spec import QuantSpec

CHUNKS = 8              # of the calibration samples, a power of 2; another number gives other bytes


def size() -> int:
    """Number of processes that work on a job."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Of this process; 0 writes all files."""
    return dist.get_rank() if size() > 1 else 0


@contextlib.contextmanager
def torchrun(device: str | None):
    """A process group for the processes that torchrun started, if it did -> the device of this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or size() > 1:
        yield device
        return
    gpu = torch.cuda.is_available() and device != "cpu"
    if gpu:
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    with _together():       # long: while rank 0 checks or writes the result, the others do nothing else
        dist.init_process_group("nccl" if gpu else "gloo", timeout=datetime.timedelta(hours=24))
    try:
        yield device
    finally:
        dist.destroy_process_group()


def agree(values: Tensor) -> Tensor:
    """What rank 0 says; `values` of one shape and dtype on all ranks."""
    if size() == 1:
        return values
    said = _placed(values.clone())
    with _together():
        dist.broadcast(said, 0)
    return said.to(values.device)


def gather(x: Tensor) -> list[Tensor]:
    """The `x` of all ranks, which have one shape and dtype."""
    sent = _placed(x.contiguous()).view(torch.uint8)            # bytes: a backend may lack the dtype
    found = [torch.empty_like(sent) for _ in range(size())]
    with _together():
        dist.all_gather(found, sent)
    return [piece.view(x.dtype).to(x.device) for piece in found]


def deal(x: Tensor, rows: list[int]) -> Tensor:
    """x [ranks, rows of this rank, n] of a piece for each rank -> [all `rows` of the ranks, n], the pieces that they have for this one."""
    sent, n = _placed(x.contiguous()), x.shape[2]
    found = sent.new_empty(sum(rows), n)
    with _together():
        dist.all_to_all_single(found.view(-1), sent.view(-1), [count * n for count in rows], [x.shape[1] * n] * len(x))
    return found.to(x.device)


def wait() -> None:
    """For all the others to come here."""
    if size() > 1:
        with _together():
            dist.barrier()


class Samples:
    """The share of this rank in `samples` calibration samples, [first, last); with `shared` False all of them.

    They are cut into 8 chunks, whatever the number of ranks, and a rank has whole chunks: `chunks` are [first, last) of every rank.
    With few samples some chunks are empty, with more than 8 ranks some have none; rank 0 has the first sample always.  `cuts`: the
    sample that each chunk begins with, and the number of all of them.
    """

    def __init__(self, samples: int, shared: bool = False, cuts: Sequence[int] = ()):
        self.parts, self.mine = (size(), rank()) if shared else (1, 0)
        self.cuts = cuts or [-(-samples * chunk // CHUNKS) for chunk in range(CHUNKS + 1)]
        bounds = [-(-CHUNKS * part // self.parts) for part in range(self.parts + 1)]
        self.chunks, self.total = list(zip(bounds, bounds[1:])), samples
        self.first, self.last = (self.cuts[chunk] for chunk in self.chunks[self.mine])

    def __len__(self) -> int:
        return self.last - self.first

    def of(self, chunk: int) -> range:
        """Places of a chunk's samples in the share of the rank that has it."""
        return range(self.cuts[chunk] - self.first, self.cuts[chunk + 1] - self.first)

    def collect(self, states: Sequence[Tensor]) -> Iterator[Tensor]:
        """The states of this rank's samples -> on rank 0 those of all, in order; all ranks call this, and the others get none."""
        for owner, (begin, end) in enumerate(self.chunks):
            for place in range(self.cuts[end] - self.cuts[begin]):
                if owner == self.mine == 0:
                    yield states[place]
                elif owner == self.mine:
                    with _together():
                        dist.send(_placed(states[place].contiguous()).view(torch.uint8), 0)
                elif self.mine == 0:
                    state = _placed(torch.empty_like(states[0], memory_format=torch.contiguous_format))
                    with _together():
                        dist.recv(state.view(torch.uint8), owner)
                    yield state.to(states[0].device)


class Rows:
    """The share of this rank in a layer: rows [first, last), whole groups of them, of format `spec`.

    `shared` False, a layer with one group, and SVD codebooks, which tie all groups together: every rank has them all.  Where there
    are more ranks than groups, some do the work of the last share as well.  `scales`, where the layer is itself a part of one:
    `scaling.scale_range` of all of that.
    """

    def __init__(self, spec: QuantSpec, shared: bool = False, scales: tuple[Tensor, Tensor] | None = None):
        self.scales = scales
        self.parts = min(size(), spec.row_groups) if shared and not spec.svd_rank else 1
        bounds = [spec.row_groups * part // self.parts for part in range(self.parts + 1)]
        self.groups = list(zip(bounds, bounds[1:]))
        self.rows = [(first * spec.group_rows, min(last * spec.group_rows, spec.rows)) for first, last in self.groups]
        self.mine = min(rank(), self.parts - 1)
        self.first, self.last = self.rows[self.mine]
        self.before, self.total = self.groups[self.mine][0], spec.row_groups
        self.spec = spec if self.parts == 1 else dataclasses.replace(spec, rows=self.last - self.first)

    def join(self, x: Tensor, groups: bool = False) -> Tensor:
        """[rows of the share, or its groups, ..] -> those of the layer."""
        if self.parts == 1:
            return x
        spans = self.groups if groups else self.rows
        counts = [last - first for first, last in spans]
        sent = x.new_zeros(max(counts), *x.shape[1:])
        sent[: len(x)] = x
        return torch.cat([piece[:count] for piece, count in zip(gather(sent), counts)])


def _placed(x: Tensor) -> Tensor:
    """Where the backend can reach it."""
    return x.cuda() if dist.get_backend() == "nccl" else x.cpu()


@contextlib.contextmanager
def _together():
    try:
        yield
    except RuntimeError as error:       # whatever the backend says when another process is gone
        raise GptvqError(f"rank {os.environ.get('RANK', '?')}: another process of this job ended ({error}); what was finished is kept, "
                         "the same command goes on with it, on any number of processes") from error
