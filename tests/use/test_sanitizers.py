"""The tests of the compiled module once more, on a build that stops at bad addresses and undefined behaviour."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAGS = "-O0 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all"      # -O1 takes five times as long to compile
# Left out: one needs an exception that pybind11 catches by a reference to nothing; the other forks while threads allocate, and the
# locks of GCC 12's sanitizer stay taken in the child then (C libraries open theirs).  Both run without sanitizers in unit/test_threads.py.
TESTS = [*(f"tests/unit/test_{name}.py" for name in ("linear_kernels", "native", "native_quantize", "packed", "threads")),
         *(f"--deselect=tests/unit/test_threads.py::test_{name}" for name in ("process_ends_while_threads_work",
                                                                            "fork_in_the_middle_of_calls"))]


def library(name):
    """Path of a run-time library of the compiler, or None."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        return None
    path = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return path if os.path.isabs(path) and os.path.exists(path) else None


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kernels_under_address_and_undefined_behaviour_sanitizers(tmp_path):
    preload = [library(name) for name in ("libasan.so", "libstdc++.so")]
    if None in preload or not library("libubsan.so"):
        pytest.skip("needs a C++ compiler with the address and undefined behaviour sanitizers (GCC: libasan, libubsan)")
    for name in ("CMakeLists.txt", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "gptvq", "triton_kernels", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("GPTVQ_", "PYTHON"))}
    build = {"GPTVQ_CUDA": "OFF", "GPTVQ_BUILD_TYPE": "Debug", "CMAKE_ARGS": f'-DCMAKE_CXX_FLAGS_DEBUG="{FLAGS}"'}
    built = subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tmp_path, env={**clean, **build},
                           capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    # Python's own leaks are not ours; a sanitizer speaks through the file descriptor, which pytest must leave alone.
    run = {"LD_PRELOAD": " ".join(preload), "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    tested = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--capture=sys", *TESTS], cwd=tmp_path,
                            env={**clean, **run}, capture_output=True, text=True)
    assert tested.returncode == 0, tested.stdout[-3000:] + tested.stderr[:5000]
    assert "passed" in tested.stdout
