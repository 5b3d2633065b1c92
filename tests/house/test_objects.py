"""Code compiled for one instruction set must not leak into what every processor runs."""
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PER_SET = ["linear_amx", "linear_avx512", "linear_avx2", "linear_neon", "linear_scalar"]
OBJECTS = [path for path in (ROOT / "build" / f"cmake-{sys.implementation.cache_tag}").glob("CMakeFiles/gptvq_cpu.dir/csrc/cpu/*.o")
           if path.name.partition(".")[0] in PER_SET]


@pytest.mark.skipif(not OBJECTS or not shutil.which("nm"), reason="needs nm and the build folder of this source tree")
@pytest.mark.parametrize("path", OBJECTS, ids=lambda p: p.name)
def test_no_function_the_linker_may_share(path):
    """Of a weak symbol it keeps one copy for all objects, whichever: perhaps the one compiled for AVX-512."""
    symbols = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True).stdout.splitlines()
    kinds = {line[17:18] for line in symbols}
    assert "T" in kinds and not [line for line in symbols if line[17:18] in set("wWvVu")]


def test_build_asks_for_no_processor_in_particular():
    for name in ("CMakeLists.txt", "setup.py"):
        flags = re.sub(r"#.*", "", (ROOT / name).read_text(encoding="utf-8"))
        assert "=native" not in flags


@pytest.mark.parametrize("name", PER_SET)
def test_sets_include_c_headers_only(name):
    """The inline functions of C++ headers are such weak symbols."""
    allowed = {"arm_neon.h", "immintrin.h", "math.h", "stdint.h", "string.h", "sys/auxv.h"}
    pending, seen = [f"cpu/{name}.cpp"], set()
    while pending:
        source = pending.pop()
        seen.add(source)
        text = (ROOT / "csrc" / source).read_text(encoding="utf-8")
        assert set(re.findall(r"#include <(.*?)>", text)) <= allowed, source
        pending += set(re.findall(r'#include "(.*?)"', text)) - seen
    assert "cpu/linear_kernel.h" in seen
