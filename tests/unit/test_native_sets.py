"""Quantization with the instructions of lesser processors, which GPTVQ_CPU asks for before the module is loaded."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptvq.backends import native

ROOT = Path(__file__).resolve().parents[2]
WANT = {"avx512": "avx512", "avx2": "avx2", "scalar": "portable"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in native.instruction_sets()[1:] if name in WANT])
def test_quantization_with(name):
    environment = {**os.environ, "GPTVQ_CPU": name, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}

    def python(*arguments):
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    text = python("-c", "from gptvq.backends import native; print(native.quantizing_text())")
    assert text.startswith(f"{WANT[name]}, ") and " amx" not in text
    assert "passed" in python("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/unit/test_native_quantize.py")
