"""The CUDA kernels on this machine: the very sources of csrc/cuda in the emulator, on a GPU where there is one."""
import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gptvq.backends import cuda, cuda_call, cuda_linear, cuda_quantize

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ORDERS = ("forward", "reverse", "round robin", "random")
CANARY = 256                            # bytes before and behind every output


def cuda_include():
    """The folder that holds cuda_fp16.h, or None."""
    places = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    places += [Path(nvcc).resolve().parents[1]] if nvcc else []
    return next((Path(p) / "include" for p in places if p and (Path(p) / "include" / "cuda_fp16.h").exists()), None)


def build_emulator(folder, sanitize=""):
    """Path of gptvq_cuda_emu, compiled anew as far as its sources changed; skips where it cannot be built."""
    missing = [tool for tool in ("c++", "cmake", "ninja") if not (shutil.which(tool) or shutil.which(tool, path=Path(sys.executable).parent))]
    include = cuda_include()
    if missing or include is None or not importlib.util.find_spec("pybind11"):
        pytest.skip(f"the emulator needs {', '.join([*missing, 'pybind11, CUDA headers (cuda_fp16.h)'])}")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    cmake = shutil.which("cmake", path=path)
    configure = [cmake, "-S", HERE, "-B", folder, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}", f"-DGPTVQ_CUDA_INCLUDE={include}",
                 f"-DGPTVQ_SANITIZE={sanitize}", f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja', path=path)}"]
    for command in (configure, [cmake, "--build", folder, "--parallel", "2"]):
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return next(Path(folder).glob("gptvq_cuda_emu*.so"))


@pytest.fixture(scope="session")
def emulator():
    """The module gptvq_cuda_emu."""
    prebuilt = os.environ.get("GPTVQ_CUDA_EMULATOR")                # the sanitizers' build, in a process of its own
    path = Path(prebuilt) if prebuilt else build_emulator(ROOT / "build" / "cuda_emu")
    spec = importlib.util.spec_from_file_location("gptvq_cuda_emu", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Guarded:
    """`cuda_call.empty` between canaries, poisoned: NaN in every float format, 255 in every byte."""

    def __init__(self):
        self.made = []

    def __call__(self, *shape, dtype, device):
        size = torch.Size(shape).numel() * dtype.itemsize
        whole = torch.full((size + 2 * CANARY,), 0xA5, dtype=torch.uint8, device=device)
        whole[CANARY : CANARY + size] = 0xFF
        self.made.append((whole, size))
        return whole[CANARY : CANARY + size].view(dtype).view(shape)

    def check(self):
        for whole, size in self.made:
            edges = torch.cat([whole[:CANARY], whole[CANARY + size :]])
            assert bool((edges == 0xA5).all()), f"a kernel wrote outside its output of {size} bytes"
        self.made.clear()


class Machine:
    """Where a test runs its kernels: `device` for its tensors, and the orders of threads to try."""

    def __init__(self, device, emulator, guarded):
        self.device, self.emulator, self.guarded = torch.device(device), emulator, guarded

    def orders(self, names=ORDERS):
        """Yields the name of each order of threads, that order set; on a GPU the one there is.  Outputs are checked after each."""
        for name in names if self.emulator else ("device",):
            if self.emulator:
                self.emulator.set_order(name, 7)
            yield name
            self.guarded.check()


@contextlib.contextmanager
def using(emulator, patch):
    """The backend `cuda` serves CPU tensors by the emulator."""
    patch.setattr(cuda_call, "kernels", emulator)
    patch.setattr(cuda, "serves", lambda device: device.type == "cpu")
    patch.setenv("GPTVQ_BACKEND", "cuda")
    emulator.set_order("forward", 7)
    yield


@pytest.fixture(params=["emulator", pytest.param("gpu", marks=pytest.mark.gpu)])
def machine(request, monkeypatch):
    """Kernels of gptvq.backends.cuda behind gptvq.ops, with guarded outputs; on CPU tensors in the emulator, on a GPU where there is one."""
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
