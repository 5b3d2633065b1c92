"""The CUDA kernels on this machine: the very sources of csrc/cuda in the emulator, on a GPU where there is one."""
import importlib.util
import os
from pathlib import Path

import pytest
from emulated_cuda import ROOT, Guarded, Machine, build_emulator, using

from gptvq.backends import cuda, cuda_call, cuda_linear, cuda_quantize


@pytest.fixture(scope="session")
def emulator():
    """The module gptvq_cuda_emu."""
    prebuilt = os.environ.get("GPTVQ_CUDA_EMULATOR")                # the sanitizers' build, in a process of its own
    path = Path(prebuilt) if prebuilt else build_emulator(ROOT / "build" / "cuda_emu")
    spec = importlib.util.spec_from_file_location("gptvq_cuda_emu", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["emulator", pytest.param("gpu", marks=pytest.mark.gpu)])
def machine(request, monkeypatch):
    """Kernels of gptvq.backends.cuda behind gptvq.ops, with guarded outputs: the emulator's on CPU tensors, and those of a GPU."""
    guarded = Guarded()
    for module in (cuda_call, cuda, cuda_quantize, cuda_linear):
        if hasattr(module, "empty"):
            monkeypatch.setattr(module, "empty", guarded)
    if request.param == "gpu":
        monkeypatch.setenv("GPTVQ_BACKEND", "cuda")
        yield Machine("cuda", None, guarded)
    else:
        with using(request.getfixturevalue("emulator"), monkeypatch):
            yield Machine("cpu", request.getfixturevalue("emulator"), guarded)
    guarded.check()
