"""The baselines of the benches compute what they claim: against float64 with the same codes and, for INT4, the same activations."""
import shutil
import subprocess

import numpy as np
import pytest
import torch

from bench import arm_mca, ggml, int4
from bench.gptq import gptq
from bench.rounding import grid, round_to_nearest, to_grid
from gptvq.errors import BackendUnavailable, ConfigError
from gptvq.hessian import Hessian

SHAPES = [(1, 1), (16, 64), (37, 101), (50, 33), (33, 640), (192, 576)]


def available(load):
    try:
        load()
    except BackendUnavailable as error:
        pytest.skip(str(error))


# ---- INT4
def quantized_activations(x, bits):
    """float64 [cols] of x float32 after rounding to 8 or 16 bits per 32 columns, in plain numpy."""
    limit, out = np.float32(127 if bits == 8 else 127 * 256 + 127), np.zeros(len(x))
    for first in range(0, len(x), 32):
        part = x[first: first + 32]
        largest = np.abs(part).max()
        if largest > 0:
            out[first: first + 32] = np.rint(part * (limit / largest)).astype(np.float64) * np.float64(largest / limit)
    return out


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("rows, cols", SHAPES)
def test_int4(rows, cols, bits, threads):
    available(int4.load)
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, 16, (rows, cols), dtype=torch.uint8, generator=generator)
    codes[0] = 15
    scale = (torch.rand(rows, -(-cols // 32), generator=generator) + 0.01).half()
    x = torch.randn(cols, generator=generator)
    x[:16] = 0
    weight = (codes.double() - 8) * scale.double().repeat_interleave(32, 1)[:, :cols]
    others = [int4.pack(codes.flip(0), scale.flip(0)) for _ in range(3)]
    products = int4.Products([*others, int4.pack(codes, scale)], rows, x, bits, threads)
    products.out.fill_(float("nan"))
    for _ in range(20):
        products()
    expected = weight.numpy() @ quantized_activations(x.numpy(), bits)
    largest = np.abs(weight.numpy()) @ np.abs(x.numpy().astype(np.float64))
    assert np.all(np.abs(products.y.numpy() - expected) <= 1e-6 * largest)
    assert np.all(np.abs(products.y.numpy() - weight.numpy() @ x.numpy()) <= (1e-2 if bits == 8 else 4e-5) * largest)


def test_int4_quantizes_to_nearest():
    weight = torch.randn(20, 100)
    codes, scale = int4.quantize(weight)
    rounded = (codes.float() - 8) * scale.float().repeat_interleave(32, 1)[:, :100]
    assert codes.max() <= 15 and ((rounded - weight).abs() <= 0.51 * scale.float().repeat_interleave(32, 1)[:, :100] + 1e-6).all()


@pytest.mark.parametrize("threads", [1, 2])
def test_reads_touch_every_line(threads):
    """The checksum is the sum over threads of the exclusive-or of all 64-bit words; each word here is a power of two."""
    available(int4.load)
    buffers = [int4.aligned(torch.zeros(64 * 37, dtype=torch.uint8)) for _ in range(2)]
    for i, line in enumerate(range(0, 37, 3)):
        buffers[i % 2].view(torch.int64)[8 * line + i % 8] = 1 << i
    assert int4.Reads(buffers, threads)() == (1 << 13) - 1


# ---- ggml
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("m", [1, 3, 6])
@pytest.mark.parametrize("kind, plain", [("Q4_0", False), ("Q4_0", True), ("Q4_K", False), ("Q2_K", False), ("Q2_K", True)])
def test_ggml(kind, plain, m, threads):
    available(ggml.load)
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(m)
    x = rng.standard_normal((m, 512), dtype=np.float32)
    data = ggml.quantize(kind, rng.standard_normal((72, 512), dtype=np.float32))
    weights = ggml.Weights(kind, data, 512, 3, plain)
    exact = x.astype(np.float64) @ gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]).astype(np.float64).T
    for calls in (0, 2):
        products = ggml.Products(weights, x, threads, calls)
        assert products.calls == (calls or 3)
        products.y.fill(np.nan)
        products()
        assert np.abs(products.y - exact).max() < 2e-2 * np.abs(exact).max()     # it rounds x to 8 bits
        products.close()
    wide = "avx512" if kind == "Q2_K" else "avx2"        # what its interleaved kernel needs
    assert (weights.buffer == "CPU") == (plain or wide not in ggml.load().instructions)
    weights.close()


def test_ggml_formats_have_blocks():
    available(ggml.load)
    with pytest.raises(ConfigError, match="blocks of 256 columns; got 576"):
        ggml.quantize("Q4_K", np.zeros((8, 576), np.float32))


# ---- NEON loops
DRIVER = """
#include <cstdint>
#include <cstdio>
extern "C" void {loop}(const std::uint8_t*, const std::int8_t*, const std::int8_t*, std::int32_t*, long);
int main() {{
  static std::uint8_t weights[{blocks} * 256];
  static std::int8_t tables[128], x[{blocks} * 32];
  std::int32_t y[16];
  if (!std::fread(weights, sizeof weights, 1, stdin) || !std::fread(tables, sizeof tables, 1, stdin)) return 2;
  if (!std::fread(x, sizeof x, 1, stdin)) return 3;
  {loop}(weights, tables, x, y, {blocks});
  return !std::fwrite(y, sizeof y, 1, stdout);
}}
"""


def plane_index(loop, block, row, col):
    """Index of the weight at (row, col) of a block of bytes, from the layout in arm_loops.cpp, one weight at a time."""
    byte = [int(block[p * 64 + 4 * row + col // (2 if loop.startswith("vq") else 1) % 4]) for p in range(4)]
    if loop == "vq_2d_k16":
        return byte[col // 16] >> (4 if col % 16 >= 8 else 0) & 15
    if loop == "vq_2d_k64":
        return [byte[0] & 63, byte[1] & 63, byte[2] & 63, byte[0] >> 6 << 4 | byte[1] >> 6 << 2 | byte[2] >> 6][col // 8]
    return byte[col // 8] >> (4 if col % 8 >= 4 else 0) & 15


@pytest.mark.parametrize("loop", arm_mca.LOOPS)
def test_arm_loops(loop, tmp_path):
    available(arm_mca.compiler)
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if emulator is None:
        pytest.skip("qemu-aarch64 is not installed (Debian: qemu-user)")
    blocks, rng = 3, np.random.default_rng(3)
    (tmp_path / "driver.cpp").write_text(DRIVER.format(loop=loop, blocks=blocks))
    subprocess.run([arm_mca.compiler(), *arm_mca.FLAGS, "-static", arm_mca.SOURCE, tmp_path / "driver.cpp", "-o", tmp_path / "driver"],
                   check=True)
    weights = rng.integers(0, 256, blocks * 256, dtype=np.uint8)
    tables, x = rng.integers(-128, 128, 128, dtype=np.int8), rng.integers(-127, 128, 32 * blocks, dtype=np.int8)
    vq, size = loop.startswith("vq"), {"vq_2d_k16": 128, "vq_2d_k64": 192}.get(loop, 256)
    order = [8 * half + 2 * pair + d for half in range(4 * blocks) for d in (0, 1) for pair in range(4)] if vq else range(len(x))
    done = subprocess.run([emulator, tmp_path / "driver"], input=weights.tobytes() + tables.tobytes() + x[list(order)].tobytes(),
                          capture_output=True, check=True)
    expected = np.zeros(16, np.int64)
    for row in range(16):
        for col in range(32 * blocks):
            index = plane_index(loop, np.resize(weights[col // 32 * size:], 256), row, col % 32)
            level = tables[(col % 2) * (16 if loop == "vq_2d_k16" else 64) + index] if vq else index - 8 * (loop == "int4")
            expected[row] += int(level) * int(x[col])
    assert np.frombuffer(done.stdout, np.int32).tolist() == expected.tolist()


@pytest.mark.parametrize(("bits", "group", "shape"), [(2, 16, (24, 96)), (3, 32, (7, 100)), (4, 64, (16, 200))])
def test_gptq(bits, group, shape):
    """On the grid, rounding where inputs do not correlate, better than rounding where they do, and as the plain recursion has it."""
    W, x = torch.randn(shape), torch.randn(4 * shape[1], shape[1]) @ torch.randn(shape[1], shape[1])
    H = x.T @ x / len(x)
    assert torch.equal(gptq(W, Hessian.from_matrix(torch.eye(shape[1])), bits, group), round_to_nearest(W, bits, group))
    Q, plain = gptq(W, Hessian.from_matrix(H), bits, group), round_to_nearest(W, bits, group)

    def loss(delta):
        return float(((delta @ H) * delta).sum())

    assert loss(W - Q) < 0.8 * loss(W - plain)
    scale, zero = (t.repeat_interleave(group, 1)[:, : shape[1]].double() for t in grid(W, bits, group))
    order = H.diagonal().argsort(descending=True, stable=True)
    damped = H.double() + 0.01 * H.diagonal().double().mean() * torch.eye(shape[1])
    w, left = W.double().clone(), order.tolist()
    while left:                                             # the optimal update of all weights not yet rounded, solved anew each time
        j, left = left[0], left[1:]
        rounded = to_grid(w[:, j], scale[:, j], zero[:, j], bits)
        error, w[:, j] = w[:, j] - rounded, rounded
        if left:
            w[:, left] += error[:, None] * torch.linalg.solve(damped[left][:, left], damped[left, j])
    assert loss(W - Q) <= 1.02 * loss(W - w.float())
    assert (Q != w.float()).float().mean() < 0.02           # float32 against float64: ties alone may differ
