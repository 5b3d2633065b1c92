"""Whether Triton's kernels can run here, and their launch: by a fixed configuration, or by one that was measured."""
from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..errors import BackendUnavailable, ConfigError

OLDEST, CAPABILITY = (3, 6), (8, 0)
#: A JSON file of measured configurations: those it lacks are measured on first use and added, so that it decides once and for all.
TUNE = "GPTVQ_TRITON_TUNE"


@functools.cache
def version() -> str:
    """Of the installed Triton, which this does not import; empty where there is none."""
    for package in ("triton", "pytorch-triton", "pytorch-triton-rocm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    return ""


def version_numbers() -> tuple[int, ...]:
    """(3, 8) for 3.8.0."""
    return tuple(map(int, re.findall(r"\d+", version())[:2]))


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def why_not(device: torch.device) -> str:
    """One clause saying why there are no Triton kernels for tensors on `device`; empty where there are."""
    if not version():
        return "triton is not installed (`pip install triton` on Linux; PyTorch for CUDA brings it along)"
    if version_numbers() < OLDEST:
        return f"triton {version()} is too old: it needs {'.'.join(map(str, OLDEST))} or newer"
    if device.type == "cpu":
        return "" if interpreted() else "Triton kernels need a GPU (TRITON_INTERPRET=1 interprets them on the CPU, very slowly: for tests)"
    return _why_no_gpu(device) if device.type == "cuda" else f"it has no kernels for device type {device.type!r}"


@functools.cache
def _why_no_gpu(device: torch.device) -> str:
    if not torch.cuda.is_available():
        return "torch sees no GPU here"
    if not torch.version.hip and torch.cuda.get_device_capability(device) < CAPABILITY:
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}: it needs {CAPABILITY[0]}.{CAPABILITY[1]}"
    return ""


def architecture(device: torch.device) -> str:
    """Key of the table of configurations."""
    old = device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) < (9, 0)
    return "sm_80" if old else "sm_90"


@functools.cache
def _kernels() -> dict:
    """All kernels by name.  Imported here and not before: importing them imports Triton."""
    try:
        from ..triton_kernels import (
            assign,
            collect,
            column_block,
            dequantize,
            em,
            vq_gemm,
            vq_gemv,
        )
    except ImportError as error:
        raise BackendUnavailable(f"gptvq's Triton kernels cannot be imported ({error}); GPTVQ_BACKEND=reference does without") from error
    return {name.removesuffix("_kernel"): kernel for module in (assign, collect, column_block, dequantize, em, vq_gemm, vq_gemv)
            for name, kernel in vars(module).items() if name.endswith("_kernel")}


def launch(kernel: str, variant: str, arguments: dict, plan: Callable[[dict], tuple], key: tuple = ()) -> None:
    """Runs a kernel on the device of its first argument.

    plan(block sizes of a configuration) -> (grid, constants of the kernel).  `key`: sizes that a measured configuration is for,
    for kernels that may run several times over.
    """
    from ..triton_kernels import configs
    name = f"{kernel} {variant}".strip()
    device = next(iter(arguments.values())).device
    options = configs.candidates(name, architecture(device))

    def run(config) -> None:
        grid, constants = plan(dict(config.blocks))
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            start(name, _kernels()[kernel], grid, arguments, {**dict(config.blocks), **constants}, config)

    path = os.environ.get(TUNE)
    run(_tuned(path, f"{name} {key}", options, run, device) if path and key and len(options) > 1 else options[0])


def start(name: str, kernel, grid: tuple, arguments: dict, constants: dict, config) -> None:
    kernel[grid](**arguments, **constants, num_warps=config.num_warps, num_stages=config.num_stages)


# ---- measured configurations
def _tuned(path: str, key: str, options: list, run: Callable, device: torch.device):
    machine = f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type}, triton {version()}"
    known = _choices(path)
    choice = known.get(machine, {}).get(key)
    found = next((config for config in options if str(config) == choice), None)
    if found is None:                                   # not measured yet, or by a release with other candidates
        found = min(options, key=lambda config: _seconds(config, run, device))
        known.setdefault(machine, {})[key] = str(found)
        partial = Path(path).with_name(Path(path).name + f".{os.getpid()}.partial")
        try:
            partial.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            os.replace(partial, path)
        except OSError as error:
            raise ConfigError(f"{TUNE}={path}: cannot be written ({error.strerror}); give another path, or unset it") from error
    return found


@functools.cache
def _choices(path: str) -> dict:
    """{machine: {kernel and sizes: configuration}} as the file had it when this process first needed it."""
    try:
        known = json.loads(Path(path).read_text(encoding="utf-8")) if Path(path).exists() else {}
        if not all(isinstance(choices, dict) for choices in known.values()):
            raise ValueError("need an object of objects")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{TUNE}={path}: not a file of configurations ({error}); delete it to measure again, or unset it") from error
    return known


def _seconds(config, run: Callable, device: torch.device, repeats: int = 9) -> float:
    """Median time of a launch; infinite where the device has not the resources for it."""
    from triton.runtime.errors import OutOfResources

    def once() -> float:
        began = time.perf_counter()
        run(config)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    try:
        once()                                          # compiles
    except OutOfResources:
        return float("inf")
    return statistics.median(once() for _ in range(repeats))


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest that is at least n and `least`."""
    return max(least, 1 << (n - 1).bit_length())


def aligned(tensor: Tensor) -> Tensor:
    """Contiguous and at an address that vector loads can use."""
    tensor = tensor.detach().contiguous()
    return tensor if tensor.is_meta or tensor.data_ptr() % 16 == 0 else tensor.clone()
