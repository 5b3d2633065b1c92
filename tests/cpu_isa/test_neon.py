"""The NEON kernels, cross-compiled and emulated, against this machine's kernels on the same packed bytes."""
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from linear_cases import ACTIVATIONS, SHAPES, TYPES, Layer, fields, relative

from gptvq.spec import FORMATS, QuantSpec

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
SOURCES = [ROOT / "csrc" / f"{name}.cpp" for name in ("common/tensor", "common/pool", "cpu/dequantize", "cpu/linear", "cpu/linear_exact",
                                                      "cpu/linear_scalar", "cpu/linear_neon")]
NATIVE = platform.machine() in ("aarch64", "arm64")
COMPILER = "c++" if NATIVE else "aarch64-linux-gnu-g++"
FLAGS = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-DGPTVQ_NEON", "-march=armv8.2-a+dotprod", f"-I{ROOT / 'csrc'}"]
MOST = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}      # of the outputs: rounded, they may differ in the last bit


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    """Runs tests/cpu_isa/linear_driver.cpp with arguments, on an emulated processor of the name given."""
    missing = [tool for tool in (COMPILER, *(() if NATIVE else ("qemu-aarch64",))) if not shutil.which(tool)]
    if missing:
        pytest.skip(f"NEON kernels need {' and '.join(missing)} (Debian: apt install g++-aarch64-linux-gnu qemu-user)")
    folder = tmp_path_factory.mktemp("neon")
    sources = [Path(__file__).with_name("linear_driver.cpp"), *SOURCES]
    objects = [folder / f"{source.stem}.o" for source in sources]

    def compiled(source, to):
        return subprocess.run([COMPILER, *FLAGS, "-c", source, "-o", to], capture_output=True, text=True)

    with ThreadPoolExecutor(os.cpu_count()) as workers:
        for done in workers.map(compiled, sources, objects):
            assert done.returncode == 0, done.stderr[-3000:]
    binary = folder / "linear_driver"
    subprocess.run([COMPILER, *(() if NATIVE else ("-static",)), "-pthread", *objects, "-o", binary], check=True)

    def run(*arguments, cpu="max"):
        emulator = [] if NATIVE else ["qemu-aarch64", "-cpu", cpu]
        done = subprocess.run([*emulator, binary, *arguments], capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.split()

    return run


def packed_case(layer, x, activations, threads):
    """One case as linear_driver.cpp reads it."""
    head = (*fields(layer.spec), int(layer.bias is not None), ACTIVATIONS[activations], TYPES[x.dtype], len(x), threads)
    tensors = [t for t in (*layer.tensors.values(), layer.bias, x) if t is not None]
    return np.array(head, dtype="<i8").tobytes() + b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors)


def outputs(driver, folder, cases, instruction_set):
    """y of each (layer, x, activations, threads)."""
    (folder / "cases").write_bytes(b"".join(packed_case(*case) for case in cases))
    driver(instruction_set, folder / "cases", folder / "outputs")
    data, at = (folder / "outputs").read_bytes(), 0
    for layer, x, _, _ in cases:
        count = len(x) * layer.spec.rows
        yield torch.frombuffer(bytearray(data), dtype=x.dtype, count=count, offset=at).view(len(x), layer.spec.rows)
        at += count * x.element_size()
    assert at == len(data)


def test_chosen_by_what_the_processor_has(driver):
    assert driver() == ["neon", "scalar"]
    if not NATIVE:
        assert driver(cpu="cortex-a72") == ["scalar"]            # of before the dot product instructions


@pytest.mark.parametrize("form", sorted(FORMATS), ids=lambda f: f"{f[0]}d{f[1]}b")
def test_same_outputs_as_here(driver, form, tmp_path):
    """All shapes, activations and types; every buffer ends at a page that may not be touched."""
    cases = []
    for i, (rows, cols, group_rows, group_cols, scale) in enumerate([*SHAPES, (37, 101, 5, 20, 0), (3, 2, 64, 4, 16), (1, 1, 1, 4, 0)]):
        layer = Layer(QuantSpec(rows, cols, *form, group_rows, group_cols, scale), seed=i, bias=i % 2 == 0)
        for activations in ACTIVATIONS:
            for tokens, dtype in ((1, torch.float32), (2, torch.bfloat16), (5, torch.float32), (3, torch.float16)):
                cases.append((layer, torch.randn(tokens, cols).to(dtype), activations, 1 + i % 3))
    for (layer, x, activations, _), y in zip(cases, outputs(driver, tmp_path, cases, "neon")):
        want = layer.run(x, activations)
        assert y.shape == want.shape and y.isfinite().all()
        assert relative(y, want) <= MOST[x.dtype]
        if x.dtype == torch.float32:
            exact, terms = layer.oracle(x, activations)
            assert ((y - exact).abs() <= 1e-6 * terms).all()


def test_odd_numbers(driver, tmp_path):
    """NaN, infinity, zeros, very small and large inputs, centroids of -128 or +-127 and arbitrary bytes come out as they do here."""
    cases = []
    for form in sorted(FORMATS):
        for group_rows, scale in ((16, 32), (4, 0), (1, 16)):
            spec = QuantSpec(35, 200, *form, group_rows, 64, scale)
            far = 127 if spec.signs else -128
            low = torch.full((spec.row_groups, spec.strips, spec.dim, spec.codewords), far, dtype=torch.int8)
            noise = torch.randint(0, 256, (spec.tiles, spec.blocks, spec.block_bytes), dtype=torch.uint8)
            x = torch.randn(8, 200)
            x[0, 7], x[1, 199], x[2], x[3], x[4] = torch.nan, -torch.inf, 0, 1e-35, 1
            x[5] *= 1e30
            for layer in (Layer(spec, cb=low, gs=torch.ones(spec.row_groups, spec.strips).bfloat16()), Layer(spec, idx=noise)):
                cases += [(layer, x, activations, 2) for activations in ACTIVATIONS]
    for (layer, x, activations, _), y in zip(cases, outputs(driver, tmp_path, cases, "neon")):
        want = layer.run(x, activations)
        assert torch.equal(y.isfinite(), want.isfinite()) and not y[:2].isfinite().any() and y[2:].isfinite().all()
        assert relative(y[2:5], want[2:5]) <= 1e-6 and relative(y[5] / 1e30, want[5] / 1e30) <= 1e-6
        assert torch.equal(y[2], layer.bias)


def test_scalar_set_of_another_processor(driver, tmp_path):
    layer = Layer(QuantSpec(77, 300, 2, 3, 16, 96, 32))
    cases = [(layer, torch.randn(3, 300), activations, 2) for activations in ACTIVATIONS]
    for (_, x, activations, _), y in zip(cases, outputs(driver, tmp_path, cases, "scalar")):
        assert relative(y, layer.run(x, activations)) <= 1e-6
