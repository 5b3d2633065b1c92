"""One job on several processes, on torch.distributed: process groups of torchrun or of the caller, nothing of our own.

Rows are independent given the Hessian, so the rows of a layer are shared out at the borders of its groups.  All that ranks tell
each other is exact, whoever says it first: least and largest values, and pieces put together in the order of ranks.  So the
result is that of one process, byte by byte, for any number of them.
"""
from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import GptvqError
from .spec import QuantSpec


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


def agree(number: int) -> int:
    """What rank 0 says."""
    if size() == 1:
        return number
    said = _placed(torch.tensor([number], dtype=torch.int64))
    with _together():
        dist.broadcast(said, 0)
    return int(said)


def wait() -> None:
    """For all the others to come here."""
    if size() > 1:
        with _together():
            dist.barrier()


class Rows:
    """The share of this rank in a layer: rows [first, last), whole groups of them, of format `spec`.

    `shared` False, a layer with one group, and SVD codebooks, which tie all groups together: every rank has them all.  Where there
    are more ranks than groups, some do the work of the last share as well.
    """

    def __init__(self, spec: QuantSpec, shared: bool = False):
        self.parts = min(size(), spec.row_groups) if shared and not spec.svd_rank else 1
        bounds = [spec.row_groups * part // self.parts for part in range(self.parts + 1)]
        self.groups = list(zip(bounds, bounds[1:]))
        self.rows = [(first * spec.group_rows, min(last * spec.group_rows, spec.rows)) for first, last in self.groups]
        self.mine = min(rank(), self.parts - 1)
        self.first, self.last = self.rows[self.mine]
        self.before, self.total = self.groups[self.mine][0], spec.row_groups
        self.spec = spec if self.parts == 1 else dataclasses.replace(spec, rows=self.last - self.first)

    def least(self, x: Tensor) -> Tensor:
        """Elementwise over all shares."""
        return self._reduce(x, dist.ReduceOp.MIN) if self.parts > 1 else x

    def largest(self, x: Tensor) -> Tensor:
        """Elementwise over all shares."""
        return self._reduce(x, dist.ReduceOp.MAX) if self.parts > 1 else x

    def join(self, x: Tensor, groups: bool = False) -> Tensor:
        """[rows of the share, or its groups, ..] -> those of the layer."""
        if self.parts == 1:
            return x
        spans = self.groups if groups else self.rows
        counts = [last - first for first, last in spans]
        sent = x.new_zeros(max(counts), *x.shape[1:])
        sent[: len(x)] = x
        sent = _placed(sent.contiguous()).view(torch.uint8)             # bytes: a backend may lack the dtype
        found = [torch.empty_like(sent) for _ in range(size())]
        with _together():
            dist.all_gather(found, sent)
        return torch.cat([piece.view(x.dtype)[:count] for piece, count in zip(found, counts)]).to(x.device)

    def _reduce(self, x: Tensor, operation) -> Tensor:
        sent = _placed(x.contiguous().clone())
        with _together():
            dist.all_reduce(sent, operation)
        return sent.to(x.device)


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
