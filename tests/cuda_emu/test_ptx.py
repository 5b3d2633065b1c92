"""What the wrappers of inline PTX do, by definitions of our own; in the emulator, and on a GPU where there is one (probes.cu)."""
import ctypes
import shutil
import subprocess

import numpy as np
import pytest
import torch
from emulated_cuda import ROOT, SOURCES

LANES = np.arange(32)


def bits(values, dtype):
    """[.., 2 or 4 numbers per word] -> words."""
    return np.ascontiguousarray(values.astype(dtype)).view(np.uint32)


def mma_inputs(k, element, a, b, d):
    """Words of each lane by the PTX ISA's figures: a [16, k] in 4 registers, b [k, 8] in 2, d [16, 8] in 4."""
    per = k // 8                                    # elements of one register
    words = np.zeros((32, 10), np.uint32)
    for lane in range(32):
        group, member = divmod(lane, 4)
        for r in range(4):
            columns = per * member + k // 2 * (r // 2) + np.arange(per)
            words[lane, r] = element(a[group + 8 * (r % 2), columns])
            words[lane, 6 + r] = np.array(d[group + 8 * (r // 2), 2 * member + r % 2]).view(np.uint32)
        for r in range(2):
            words[lane, 4 + r] = element(b[per * member + k // 2 * r + np.arange(per), group])
    return words


def mma_outputs(product):
    """[16, 8] -> words of each lane."""
    at = LANES[:, None] // 4 + 8 * (np.arange(4) // 2), LANES[:, None] % 4 * 2 + np.arange(4) % 2
    return product[at].view(np.uint32)


def float_mma(rng, to_words):
    """Small integers: every sum is exact, in whatever order the hardware takes it."""
    a, b, d = (rng.integers(-8, 9, shape).astype(np.float32) for shape in ((16, 16), (16, 8), (16, 8)))
    return mma_inputs(16, to_words, a, b, d), mma_outputs((d + a @ b).astype(np.float32))


def half_words(v):
    return bits(v, np.float16)[0]


def bfloat_words(v):
    return torch.from_numpy(v.copy()).bfloat16().view(torch.int32).numpy().view(np.uint32)[0]


def byte_words(v):
    return bits(v, np.int8)[0]


def int_mma(rng):
    a, b = rng.integers(-128, 128, (16, 32)), rng.integers(-128, 128, (32, 8))
    d = rng.integers(-2**20, 2**20, (16, 8))
    return mma_inputs(32, byte_words, a, b, d.astype(np.int32)), mma_outputs((d + a @ b).astype(np.int32))


def as_bytes(words):
    return np.ascontiguousarray(words, dtype=np.uint32).view(np.uint8).reshape(len(words), -1)


def permuted(a, b, selector, signs):
    source = as_bytes(np.stack([a, b], 1))
    out = np.zeros((len(a), 4), np.uint8)
    for i in range(4):
        pick = selector >> 4 * i & 15
        byte = source[LANES, pick & 7]
        out[:, i] = np.where((pick & 8 != 0) & signs, np.where(byte & 128, 255, 0), byte)
    return out.view(np.uint32)[:, 0]


def matrices(words, count):
    """Register i of lane l: columns 2 (l % 4) .. of row l / 4 of matrix i, whose rows are the 16 bytes of lanes 8 i ..."""
    return np.stack([words[8 * i + LANES // 4, LANES % 4] for i in range(count)], 1)


def dot(a, b, c, dtype):
    a, b = (as_bytes(v[:, None]).view(dtype).astype(np.int64) for v in (a, b))
    return ((a * b).sum(1) + c.astype(np.int64)).astype(np.uint64).astype(np.uint32)


def random_words(rng, n):
    return rng.integers(0, 2**32, (32, n), dtype=np.uint64).astype(np.uint32)


def zero_filled(words):
    return np.where(np.arange(16) < (LANES % 17)[:, None], as_bytes(words), 0).astype(np.uint8).view(np.uint32)


def shuffled(v):
    v, pick, low, half = v[:, 0], v[:, 0] % 32, LANES % 8, LANES // 16 * 16
    down, up = np.where(low + 3 < 8, LANES + 3, LANES), np.where(low >= 3, LANES - 3, LANES)
    return np.stack([v[pick], v[half + pick % 16], v[LANES ^ 5], v[down], v[up]], 1)


def voted(v):
    v = v[:, 0]
    halves = v.reshape(2, 16)
    of = LANES // 16
    same = np.array([sum(1 << m for m in range(32) if v[m] % 4 == v[lane] % 4) for lane in LANES], np.uint32)
    whole = [sum(int(x & 1) << lane for lane, x in enumerate(v)), v.astype(np.uint64).sum() % 2**32, v.view(np.int32).max().view(np.uint32),
             np.bitwise_xor.reduce(v)]
    ballot, total, most, parity = (np.full(32, w, np.uint32) for w in whole)
    return np.stack([ballot, (halves % 16 == 0).any(1)[of], (halves < 2**31).all(1)[of], same, total, halves.min(1)[of], most,
                     np.bitwise_or.reduce(halves, 1)[of], parity], 1).astype(np.uint32)


def integers(v):
    a, b, c = v.T
    both = b.astype(np.uint64) << np.uint64(32) | a
    zeros = [32 - int(x >> (s & 31)).bit_length() for x, s in zip(a.tolist(), c.tolist())]
    return np.stack([permuted(a, b, c & 0x7777, False), dot(a, b, c.view(np.int32), np.int8), dot(a, b, c, np.uint8),
                     (both >> (c & 31).astype(np.uint64)).astype(np.uint32), (a.astype(np.uint64) * b >> np.uint64(32)).astype(np.uint32),
                     np.array(zeros, np.uint32)], 1)


def atomics(v):
    total = int(v.astype(np.uint64).sum())
    return np.tile(np.array([total % 2**32, v.min(), v.max(), 9, total >> 32], np.uint32), (32, 1))


def logic(v):
    a, b, c = v.T
    return np.stack([a & b | c, a ^ b ^ c, a & b | a & c | b & c], 1)


def addresses(v):
    word = v[:, 0]
    return np.stack([LANES.astype(np.uint32), word, word[LANES ^ 1] & 0xffff, word[LANES ^ 1] >> 16], 1)


#: name -> (words per lane in, what comes out of them), or a function of the generator that makes both
PROBES = {
    "cp_async16": (4, lambda v: v[::-1]), "cp_async16_zfill": (4, zero_filled), "cp_async4": (4, lambda v: v[:, [1, 0, 3, 2]]),
    "ldmatrix_x4": (4, lambda v: matrices(v, 4)), "ldmatrix_x2": (4, lambda v: matrices(v, 2)),
    "mma_m16n8k16": lambda rng: float_mma(rng, half_words), "mma_m16n8k16_bf16": lambda rng: float_mma(rng, bfloat_words),
    "mma_m16n8k32_s8": int_mma, "prmt": (3, lambda v: permuted(*v.T, True)[:, None]), "lop3": (3, logic),
    "load_stream": (8, lambda v: v[:, :7]), "load_stream_if": (2, lambda v: np.where(LANES[:, None] % 2, 0, v).astype(np.uint32)),
    "addresses": (2, addresses),
    "shuffles": (1, shuffled), "votes": (1, voted), "integers": (3, integers), "atomics": (1, atomics),
}


@pytest.fixture(scope="module", params=["emulator", pytest.param("gpu", marks=pytest.mark.gpu)])
def probe(request, tmp_path_factory):
    """probe(name, words in, count of words out) -> words out."""
    if request.param == "emulator":
        path, device = request.getfixturevalue("emulator").__file__, "cpu"
    else:
        nvcc = shutil.which("nvcc") or pytest.skip("no nvcc to compile the probes with")
        path, device = tmp_path_factory.mktemp("probes") / "probes.so", "cuda"
        subprocess.run([nvcc, "-std=c++17", "-O2", "-arch=native", "-shared", "-Xcompiler=-fPIC", f"-I{ROOT / 'csrc'}",
                        SOURCES / "probes.cu", "-o", path], check=True)
    function = ctypes.CDLL(str(path)).gptvq_probe
    function.restype, function.argtypes = ctypes.c_char_p, [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64]

    def call(name, words, count):
        given = torch.from_numpy(np.ascontiguousarray(words).view(np.int32)).to(device)
        out = torch.full((32, count), -1, dtype=torch.int32, device=device)
        stream = torch.cuda.current_stream().cuda_stream if device == "cuda" else 0
        said = function(name.encode(), given.data_ptr(), out.data_ptr(), stream)
        assert said == b"", said.decode()
        return out.cpu().numpy().view(np.uint32)

    return call


@pytest.mark.parametrize("name", PROBES)
def test_wrapper_does_what_it_says(probe, name):
    rng = np.random.default_rng(5)
    for _ in range(20):
        case = PROBES[name]
        given, want = case(rng) if callable(case) else (words := random_words(rng, case[0]), case[1](words))
        got = probe(name, given, want.shape[1])
        assert (got == want).all(), (got, want)


def test_every_wrapper_has_a_probe():
    """A wrapper added to platform.cuh without a probe would be trusted blindly."""
    import re
    text = (ROOT / "csrc/cuda/platform.cuh").read_text()
    wrappers = set(re.findall(r"__device__ __forceinline__ [\w:]+ (\w+)\(", text)) - {"shared_address"}
    probes = (SOURCES / "probes.cu").read_text()
    assert len(wrappers) > 10 and not [w for w in wrappers if not re.search(rf"\b{w}\b", probes)]
