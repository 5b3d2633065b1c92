"""What nvcc makes of the kernels: registers, stack and spills of each, and their instructions."""
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("sm_80", "sm_90a")
_FOLDER = tempfile.TemporaryDirectory(prefix="gptvq-cubin-")      # made here: two threads that ask first would make two, and lose one


def nvcc():
    """Path of nvcc; skips where there is none."""
    found = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin"))
    return found or pytest.skip("needs nvcc")


@functools.lru_cache(maxsize=None)
def compiled(name, architecture):
    """(path of the cubin, what ptxas says) of csrc/cuda/{name}.cu; compiled once per process."""
    cubin = Path(_FOLDER.name) / f"{name}.{architecture}.cubin"
    done = subprocess.run([nvcc(), "-std=c++17", "-O3", f"-arch={architecture}", f"-I{ROOT / 'csrc'}", "-cubin", "-Xptxas", "-v",
                           ROOT / "csrc" / "cuda" / f"{name}.cu", "-o", cubin], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return cubin, done.stderr


def resources(name, architecture):
    """{kernel with its template arguments: {"registers", "stack", "spills", "shared"}} of csrc/cuda/{name}.cu."""
    found = {}
    for part in compiled(name, architecture)[1].split("Compiling entry function '")[1:]:
        used = {"registers": r"Used (\d+) registers", "stack": r"(\d+) bytes stack frame", "spills": r"(\d+) bytes spill stores",
                "shared": r"(\d+) bytes smem"}
        found[plain(part.split("'")[0])] = {key: int((re.search(pattern, part) or [0, 0])[1]) for key, pattern in used.items()}
    return found


def plain(mangled):
    """_ZN5gptvq11pack_kernelILi2ELi1EEE.. -> pack_kernel<2, 1>."""
    filt = shutil.which("c++filt")
    if filt is None:
        return re.sub(r"^_ZN?(?:\d+\w+?)?(\d+)", "", mangled)
    text = subprocess.run([filt, mangled], capture_output=True, text=True, check=True).stdout.strip()
    text = re.sub(r"\((?:int|bool|unsigned)\)", "", text)               # of template arguments
    return re.sub(r"\b(?:gptvq|cuda)::|\(anonymous namespace\)::|^void ", "", text).split("(")[0].strip()


def cuobjdump():
    """Path of cuobjdump: of the toolkit, or of a triton wheel, which brings one; None without either."""
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path="/usr/local/cuda/bin")
    triton = importlib.util.find_spec("triton")
    beside = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if triton and triton.origin else None
    return found or (str(beside) if beside and beside.exists() else None)


@functools.lru_cache(maxsize=None)
def instructions(name, architecture):
    """{kernel with its template arguments: SASS text} of csrc/cuda/{name}.cu; skips without cuobjdump."""
    tool = cuobjdump() or pytest.skip("needs cuobjdump (of the CUDA toolkit or of triton)")
    text = subprocess.run([tool, "-sass", compiled(name, architecture)[0]], capture_output=True, text=True, check=True).stdout
    return {plain(part.split()[0]): part for part in text.split("Function : ")[1:]}
