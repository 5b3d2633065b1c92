"""The emulator of csrc/cuda on this machine: how it is built, and what the tests of the kernels run on."""
import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gptvq.backends import cuda, cuda_call

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "tests" / "cuda_emu"
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
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    missing = [tool for tool in ("c++", "cmake", "ninja") if not shutil.which(tool, path=path)]
    include = cuda_include()
    if missing or include is None or not importlib.util.find_spec("pybind11"):
        pytest.skip(f"the emulator needs {', '.join([*missing, 'pybind11 and the headers of CUDA (cuda_fp16.h)'])}")
    cmake = shutil.which("cmake", path=path)
    configure = [cmake, "-S", SOURCES, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja', path=path)}",
                 f"-DPython_EXECUTABLE={sys.executable}", f"-DGPTVQ_CUDA_INCLUDE={include}", f"-DGPTVQ_SANITIZE={sanitize}"]
    for command in (configure, [cmake, "--build", folder, "--parallel", "2"]):
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return next(Path(folder).glob("gptvq_cuda_emu*.so"))


def sanitizer_environment():
    """Variables of a process that may load code compiled with the address sanitizer; skips where the compiler has none."""
    found = [subprocess.run(["c++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
             for name in ("libasan.so", "libstdc++.so", "libubsan.so")] if shutil.which("c++") else []
    if not found or not all(os.path.isabs(path) and os.path.exists(path) for path in found):
        pytest.skip("needs a C++ compiler with the address and undefined behaviour sanitizers (GCC: libasan, libubsan)")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("GPTVQ_", "PYTHON"))}
    return {**clean, "LD_PRELOAD": " ".join(found[:2]), "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}


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
        names = names[-1:] if os.environ.get("GPTVQ_EMULATOR_ORDERS") == "one" else names      # under sanitizers, which are slow
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
