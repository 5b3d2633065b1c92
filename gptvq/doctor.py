"""What this machine offers, and which kernels run on it."""
from __future__ import annotations

import importlib.metadata
import os
import platform
import sys

import torch

from . import large_pages, ops
from .backends import cuda, native, triton, triton_launch
from .checkpoint import VERSION
from .errors import BackendUnavailable


def diagnose() -> dict[str, str]:
    """{topic: one sentence}, in the order in which to read it."""
    cpu = torch.device("cpu")
    found = {
        "gptvq": f"{VERSION}, Python {platform.python_version()} on {platform.machine()}",
        "libraries": ", ".join(f"{name} {_version(name)}" for name in ("torch", "transformers", "safetensors", "numpy")),
        "backend": f"{_name(cpu)} on the CPU" + _forced("GPTVQ_BACKEND"),
    }
    if native.serves(cpu):
        sets = native.instruction_sets()
        forced = os.environ.get("GPTVQ_CPU", "")
        found["CPU kernels"] = (f"GPTVQ_CPU={forced} is not among {', '.join(sets)}: packed layers will refuse to run" if forced and
                                forced not in sets else f"{forced or sets[0]}{_forced('GPTVQ_CPU')}; this processor and build have {', '.join(sets)}")
        found["CPU quantizing"] = native.quantizing_text()
    else:
        found["CPU kernels"] = f"none: {native.why_not(cpu)}; packed layers are unpacked on every call"
    found["weights in RAM"] = f"small pages: {large_pages.why_not()}" if large_pages.why_not() else "in large pages"
    found["threads"] = (f"{torch.get_num_threads()} of {os.cpu_count()} processors (torch.set_num_threads or OMP_NUM_THREADS)" +
                        "; they sleep between layers (OMP_WAIT_POLICY), which slows decoding down" * _sleepy())
    found["CUDA in torch"] = (f"{torch.version.cuda}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else
                              f"no device (torch built with CUDA {torch.version.cuda})" if torch.version.cuda else "torch is a CPU build")
    found["CUDA in gptvq"] = native.cuda_text()
    gpu = torch.device("cuda")
    found["GPU layers"] = f"{_name(gpu)} backend" if torch.cuda.is_available() else "no GPU that torch can use"
    found["CUDA kernels"] = f"run on {torch.cuda.get_device_name()}" if cuda.serves(gpu) else f"none: {cuda.why_not(gpu)}"
    missing = triton.why_not(gpu)
    found["triton"] = f"{triton_launch.version() or 'not installed'}; " + (f"no kernels: {missing}" if missing else "kernels for the GPU")
    return found


def _name(device: torch.device) -> str:
    try:
        return ops.chosen(device).__name__.rpartition(".")[2]
    except BackendUnavailable as error:
        return f"none ({error})"


def _sleepy() -> bool:
    return torch.get_num_threads() > 1 and os.environ.get("OMP_WAIT_POLICY", "").strip().lower() == "passive"


def _forced(variable: str) -> str:
    return f" (set by {variable})" if os.environ.get(variable) else ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed" if package not in sys.modules else "unknown"
