"""The machine a job runs on: what to note of it, what decides the bytes of a result, and how much memory is left."""
from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import itertools
import os
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def device_class(device) -> str:
    """Of a torch.device: jobs on devices of one class, with the same versions, give the same bytes."""
    import torch

    from . import ops
    from .backends import native

    backend = ops.backend(device).__name__.rpartition(".")[2]
    if device.type != "cpu":
        return f"{torch.cuda.get_device_name(device)}, {backend}"
    kernels = os.environ.get("GPTVQ_CPU") or native.instruction_sets()[0] if native.serves(device) else "no kernels"
    return f"CPU {platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {backend} {kernels}"


def home_of(model):
    """The torch.device that a model's inputs belong on: that of its first tensor, those not read yet (on meta) left out."""
    import torch

    tensors = itertools.chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors if not tensor.is_meta), torch.device("cpu"))


def versions() -> dict[str, str]:
    """Of the packages that decide the bytes of a result."""
    return {name: importlib.metadata.version(name) for name in ("gptvq", "torch", "transformers") if _installed(name)}


def available_memory() -> int:
    """Bytes that can be used without swapping, also within the limits of a container."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    with contextlib.suppress(OSError):
        found = re.search(r"^MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text(), flags=re.M)
        free = 1024 * int(found[1]) if found else free
    with contextlib.suppress(OSError, ValueError):          # "max" where there is no limit
        limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, max(limit - used, 0))
    return free


def peak_memory() -> int:
    """Most bytes of memory that this process has held so far, in RAM; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:                                 # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass(frozen=True)
class Memory:
    """Bytes of this process in RAM: now, and at most since the last reset."""

    now: int
    peak: int


def resident_memory(reset: bool = False) -> Memory:
    """What Linux says; zeros elsewhere.  reset: the peak counts from here on."""
    status = Path("/proc/self/status")
    if not status.exists():
        return Memory(0, 0)
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    found = Memory(*(1024 * int(fields[name].split()[0]) for name in ("VmRSS", "VmHWM")))
    if reset:
        with contextlib.suppress(OSError):                      # not on this kernel: the peak since the start is an upper bound
            Path("/proc/self/clear_refs").write_text("5")
    return found


def trim_memory() -> None:
    """Gives the pages that hold nothing but freed memory back to the system.

    glibc's malloc only does so at the end of its heap, and tensors of many sizes leave holes behind: a run that holds less and less
    would take more and more.  Does nothing with other C libraries.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):       # TypeError: Windows has no library of the program itself
        ctypes.CDLL(None).malloc_trim(0)


def environment() -> dict[str, Any]:
    """Processor, cores and versions of what decides the bytes and the speed of a run; JSON ready."""
    import torch

    return {"machine": platform.machine(), "system": platform.system(), "processor": _processor(), "cores": os.cpu_count(),
            "threads": torch.get_num_threads(), "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
            "python": platform.python_version(), **versions()}


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _processor() -> str:
    if sys.platform.startswith("linux"):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
