"""Where the compiled module gptvq._C comes from, and what it is told of PyTorch."""
from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor, nn

from . import watching

#: As kInterface of csrc/bindings.cpp.
INTERFACE = 3


def compiled() -> tuple[object, str]:
    """(the module gptvq._C, "") or (None, why it is not used)."""
    tree = Path(__file__).resolve().parents[2]
    sources = (tree / "setup.py").is_file() and (tree / "csrc").is_dir()
    try:
        from .. import _C
    except ImportError as error:    # a source tree that was not built, or a build for another Python
        return None, f"cannot be imported ({error}); " + (
            f"{tree} is the source tree: run `pip install -e .` there, or work in another folder, where an installed gptvq is found"
            if sources else "install gptvq with `pip install .`")
    if getattr(_C, "interface", None) != INTERFACE:
        return None, f"was built from other sources than {tree / 'gptvq'}; run `pip install {'-e ' if sources else ''}.` again"
    return _C, ""


def introduce_torch(_C) -> None:
    """What the module cannot know by itself, as it is built without PyTorch's headers."""
    _C.use_threads_of(_parallel_for())
    _C.set_torch(Tensor, nn.Parameter, watching.modes, watching.tracing, watching.level, watching.forward_ad, torch.is_grad_enabled,
                 torch.get_num_threads)


def _parallel_for() -> int:
    """The address of torch_parallel_for, of PyTorch's stable C interface; 0 where there is none."""
    try:
        return ctypes.cast(ctypes.CDLL(torch._C.__file__).torch_parallel_for, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0
