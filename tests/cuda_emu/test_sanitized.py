"""The tests of the kernels once more, on an emulator that stops at bad addresses and undefined behaviour."""
import os
import subprocess
import sys

import pytest
from emulated_cuda import ROOT, build_emulator, sanitizer_environment

OVERRUN = """
import ctypes, sys
import numpy as np
function = ctypes.CDLL(sys.argv[1]).gptvq_bug
function.restype, function.argtypes = ctypes.c_char_p, [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p]
x, y = np.zeros(128, np.float32), np.zeros(2, np.float32)
assert function(b"none", x.ctypes.data, y.ctypes.data) == b""
print("right kernel ran", flush=True)
function(sys.argv[2].encode(), x.ctypes.data, y.ctypes.data)
"""


@pytest.fixture(scope="module")
def sanitized():
    """(path of the emulator, environment of a process that can load it)."""
    environment = sanitizer_environment()
    return build_emulator(ROOT / "build" / "cuda_emu_sanitized", "address,undefined"), environment


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("bug, says", [("global overrun", "heap-buffer-overflow"), ("dynamic overrun", "use-after-poison")])
def test_access_behind_a_tensor_is_noticed(sanitized, bug, says):
    path, environment = sanitized
    done = subprocess.run([sys.executable, "-c", OVERRUN, path, bug], env=environment, capture_output=True, text=True)
    assert "right kernel ran" in done.stdout and done.returncode != 0
    assert says in done.stderr and "bugs.cu" in done.stderr, done.stderr[:3000]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kernels_under_sanitizers(sanitized):
    path, environment = sanitized
    others = ("test_sanitized", "test_machine_code", "test_pipeline")       # the last has the same kernels, over and over
    tests = [str(p) for p in sorted((ROOT / "tests" / "cuda_emu").glob("test_*.py")) if p.stem not in others]
    left_out = ["-k", "not overrun and not misaligned"]             # the seeded mistakes that end the process
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow and not gpu", "-p", "no:cacheprovider", "--capture=sys",
                           *left_out, *tests], cwd=ROOT, capture_output=True, text=True,
                          env={**environment, "GPTVQ_CUDA_EMULATOR": str(path), "GPTVQ_EMULATOR_ORDERS": "one"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[:5000]
    assert "passed" in done.stdout and os.path.exists(path)
