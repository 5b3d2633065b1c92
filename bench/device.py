"""Timing on a GPU: a run as one CUDA graph, events around its replays.  On the CPU, to try a bench out, plain calls and the clock."""
from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable

import torch

from gptvq.errors import BackendUnavailable

from . import runner

RING_BYTES = 200 << 20          # of weights between two uses of one: four times the largest L2


def require(device: torch.device) -> torch.device:
    """`device`, if it is there; BackendUnavailable otherwise."""
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable(f"--device {device}: there is no CUDA device here (torch.cuda.is_available() is False)")
    return device


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(device: torch.device) -> int | None:
    """Most memory that torch has had in use on a GPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def graphed(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Replays what `run` launches, without Python's cost; `run` itself on the CPU."""
    if device.type != "cuda":
        return run
    with torch.cuda.device(device):                     # a capture and its stream are those of the current device
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):                          # allocations and choices of algorithms belong to no graph
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run()
    return graph.replay


def seconds(run: Callable[[], object], loops: int, device: torch.device) -> float:
    """Of one of `loops` calls in a row."""
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(loops):
            run()
        return (time.perf_counter() - began) / loops
    with torch.cuda.device(device):                     # whose stream the events are recorded on
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(loops):
            run()
        end.record()
        end.synchronize()
    return begin.elapsed_time(end) / 1e3 / loops


def paired(runs: dict[str, Callable[[], object]], repeats: int, device: torch.device, least: float = 0.02) -> dict[str, list[float]]:
    """Seconds per call of each in turns, each sample of about `least` seconds."""
    loops = {}
    for name, run in runs.items():
        seconds(run, 1, device)
        loops[name] = max(1, math.ceil(least / max(seconds(run, 1, device), 1e-6)))
    return runner.turns({name: functools.partial(seconds, run, loops[name], device) for name, run in runs.items()}, repeats)
