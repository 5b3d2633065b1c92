"""Triton kernels on CUDA tensors, where the compiled CUDA kernels are missing; the same functions as backends.reference.

What has no Triton kernel is PyTorch's, from the reference: products of float matrices, and packing.  So is everything that is not
float32 while solving, and what works on the codes of a signed format: its 4096 candidates for each vector, 256 centroids under all changes
of sign, would not fit a program's registers.  Nothing here imports Triton before the first launch.  No atomics: two runs give the same
bytes.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec import BLOCK_COLS, QuantSpec
from . import reference
from .reference import (  # noqa: F401
    cross,
    gram,
    matmul,
    matvec,
    pack_codes,
    submatmul,
    unpack_codes,
)
from .triton_launch import (
    aligned,
    cdiv,
    interpreted,
    launch,
    power_of_two,
    version_numbers,
    why_not,
)

GEMV_TO, GEMM_TO = 8, 256               # tokens; more are multiplied by the dequantized weight
_ACCUMULATORS = 8192                    # float32 of a program that column_block and descent_block keep in registers


def serves(device: torch.device) -> bool:
    return not why_not(device)


# ---- packed weights
class _Packed:
    """A packed weight as the kernels take it: `arguments` they share, `constants` of its format."""

    def __init__(self, idx, cb, gs, sc, table, spec: QuantSpec):
        words = 3 if spec.code_bits in (3, 6, 12) else 1
        vectors = 32 // spec.code_bits if words == 1 else BLOCK_COLS // spec.dim
        integer = {1: torch.int8, 2: torch.int16, 4: torch.int32}[spec.dim]
        self.spec = spec
        self.tensors = {
            "idx": aligned(idx).view(torch.int32), "cb": aligned(cb.transpose(2, 3)).view(integer), "gs": aligned(gs.float()),
            "sc": None if sc is None else aligned(sc), "table": None if table is None else aligned(table.float())}
        self.sizes = {"rows": spec.rows, "cols": spec.cols, "units": spec.blocks * BLOCK_COLS // (vectors * spec.dim)}
        self.counts = {"strips": spec.strips, "pairs": cdiv(spec.scale_blocks, 2)}
        self.constants = {"BITS": spec.code_bits, "DIM": spec.dim, "V": vectors, "WORDS": words, "GROUP_ROWS": spec.group_rows,
                          "GROUP_COLS": spec.group_cols, "SCALE_BLOCK": spec.scale_block}
        self.key = tuple({**self.sizes, **self.constants}.values())

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        spec = self.spec
        out = torch.empty(spec.rows, spec.cols, dtype=dtype, device=self.tensors["idx"].device)
        launch("dequantize", "", {**self.tensors, "out": out, **self.sizes, **self.counts},
               lambda b: ((cdiv(spec.rows, b["R"]), cdiv(spec.vectors, b["N"])), self.constants), (*self.key, str(dtype)))
        return out


def dequantize(idx: Tensor, cb: Tensor, gs: Tensor, sc: Tensor | None, table: Tensor | None, spec: QuantSpec,
               dtype: torch.dtype) -> Tensor:
    return _Packed(idx, cb, gs, sc, table, spec).dequantize(dtype)


class PreparedLinear(_Packed):
    """f(x, activations) for one packed weight on its device; the activations are never rounded, whatever `activations` says."""

    def __init__(self, idx, cb, gs, sc, table, bias, spec: QuantSpec):
        super().__init__(idx, cb, gs, sc, table, spec)
        self.bias = None if bias is None else aligned(bias.float())

    def __call__(self, x: Tensor, activations: str) -> Tensor:
        rows, tokens = self.spec.rows, x.numel() // self.spec.cols
        if tokens > GEMM_TO:
            return F.linear(x, self.dequantize(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        y = x.new_empty((*x.shape[:-1], rows))
        if tokens == 0:
            return y
        given = {"x": aligned(x), **self.tensors, "bias": self.bias, "y": y, "tokens": tokens, **self.sizes}
        key = (*self.key, str(x.dtype), self.bias is not None)
        if tokens <= GEMV_TO:
            m, unit = power_of_two(tokens), self.constants["V"] * self.constants["DIM"]
            variant = f"3 words M={m}" if self.constants["WORDS"] == 3 else f"M={m}"
            fixed = {**self.constants, "M": m, "ROWS_LAST": version_numbers() > (3, 6)}
            launch("vq_gemv", variant, {**given, "tiles": self.spec.tiles, **self.counts},
                   lambda b: ((cdiv(rows, b["R"]),), {**fixed, "EVEN": self.spec.cols % (b["C"] * unit) == 0}), key)
        else:
            m = min(64, power_of_two(tokens, least=16))
            variant = f"float32 M={m}" if x.dtype == torch.float32 else f"M={m}"
            launch("vq_gemm", variant, {**given, **self.counts},
                   lambda b: ((cdiv(rows, b["R"]), cdiv(tokens, b["M"])), {**self.constants, **_operands(x.dtype)}), key)
        return y


def _operands(dtype: torch.dtype) -> dict:
    """How tl.dot multiplies: the tensor cores take half types as they are, and float32 in three products that lose little."""
    import triton.language as tl
    if dtype == torch.float32 or dtype == torch.bfloat16 and interpreted():     # the interpreter has no bfloat16 arithmetic
        return {"OPERAND": tl.float32, "PRECISION": "tf32x3"}
    return {"OPERAND": tl.float16 if dtype == torch.float16 else tl.bfloat16, "PRECISION": "tf32"}


prepare_linear = PreparedLinear


def linear(x: Tensor, idx: Tensor, cb: Tensor, gs: Tensor, sc: Tensor | None, table: Tensor | None, bias: Tensor | None, spec: QuantSpec,
           activations: str) -> Tensor:
    """The operator; prepared anew on each call, as tensors that outlive one must not lie in the memory of a CUDA graph."""
    return PreparedLinear(idx, cb, gs, sc, table, bias, spec)(x, activations)


# ---- quantization
def _all_float32(*tensors: Tensor | None) -> bool:
    return all(t is None or t.dtype == torch.float32 for t in tensors)


def _up_to(k: int) -> str:
    """Variant of the kernels that hold a codebook of k centroids, k <= 256."""
    return f"K<={next(size for size in (16, 64, 256) if k <= size)}"


def fit(x: Tensor, metric: Tensor, weight: Tensor, seeds: Tensor, rounds: tuple[tuple[int, int], ...]) -> Tensor:
    groups, points, d = x.shape
    k = seeds.shape[2]
    if not _all_float32(x, metric, weight, seeds):
        return reference.fit(x, metric, weight, seeds, rounds)
    x, size = aligned(x), d + d * (d + 1) // 2
    features = x.new_empty(groups, size + 1, points)
    launch("quadratic_features", "", {"x": x, "metric": aligned(metric), "weight": aligned(weight), "out": features, "N": points,
                                      "metrics": len(metric)},
           lambda b: ((groups, cdiv(points, b["BN"])), {"DIM": d, "F": size}))
    tried, group = seeds, torch.arange(groups, device=x.device)
    block_k, block_f = power_of_two(k, least=16), 16
    for iterations, keep in rounds:
        tried = tried.clone(memory_format=torch.contiguous_format)
        problems = len(tried) * groups
        loss = x.new_empty(problems, dtype=torch.float64)
        launch("em", _up_to(k), {
            "features": features, "x": x, "centroids": tried, "index": x.new_full((problems, points), -1, dtype=torch.int16),
            "distance": x.new_empty(problems, points), "sums": x.new_empty(problems, block_k, block_f, dtype=torch.float64),
            "loss": loss, "N": points, "groups": groups, "iterations": iterations, "K": k},
            lambda b, problems=problems: ((problems,), {"DIM": d, "F": size, "BLOCK_K": block_k, "BLOCK_F": block_f}))
        tried = tried[loss.view(-1, groups).argsort(dim=0, stable=True)[:keep], group]
    return tried[0]


def assign(x: Tensor, metric: Tensor, centroids: Tensor, group_rows: int) -> Tensor:
    index = torch.empty(len(x), dtype=torch.uint8, device=x.device)
    k, d = centroids.shape[1:]

    def plan(b):
        return (cdiv(len(x), b["R"]),), {"DIM": d, "GROUP_ROWS": group_rows, "SHARED": group_rows % b["R"] == 0, "BLOCK_K": power_of_two(k)}

    launch("assign", "", {"x": aligned(x), "metric": aligned(metric), "centroids": aligned(centroids), "index": index, "rows": len(x),
                          "K": k}, plan)
    return index


def _by_block(kernel: str, given: dict, centroids: Tensor, strip: Tensor, scale: Tensor | None, index: Tensor, out: Tensor,
              group_rows: int, **constants) -> None:
    """Launches column_block or descent_block, whose arguments differ in the first four only."""
    rows, n = index.shape
    _, strips, k, d = centroids.shape
    width = power_of_two(n * d, least=16)

    def plan(b):
        r = min(b["R"], max(1, _ACCUMULATORS // width))
        return (cdiv(rows, r),), {"DIM": d, "GROUP_ROWS": group_rows, "SHARED": group_rows % r == 0, "SCALED": scale is not None, "R": r,
                                  "B": width, "BLOCK_K": power_of_two(k), **constants}

    launch(kernel, _up_to(k), {
        **{name: aligned(t) for name, t in given.items()}, "centroids": aligned(centroids), "strip": aligned(strip),
        "scale": None if scale is None else aligned(scale), "index": index, "E" if kernel == "column_block" else "change": out,
        "rows": rows, "n": n, "strips": strips, "K": k}, plan)


def column_block(W: Tensor, U: Tensor, roots: Tensor, centroids: Tensor, strip: Tensor, scale: Tensor | None,
                 group_rows: int, stale: bool = False, signed: bool = False) -> tuple[Tensor, Tensor]:
    if signed or not _all_float32(W, U, roots, centroids, scale):
        return reference.column_block(W, U, roots, centroids, strip, scale, group_rows, stale, signed)
    index, E = torch.empty(len(W), len(roots), dtype=torch.uint8, device=W.device), torch.empty(W.shape, device=W.device)
    _by_block("column_block", {"W": W, "transposed": U.T, "roots": roots, "metric": roots @ roots.transpose(1, 2)}, centroids, strip, scale,
              index, E, group_rows, STALE=stale)
    return index, E


def descent_block(R: Tensor, H: Tensor, index: Tensor, centroids: Tensor, strip: Tensor, scale: Tensor | None,
                  group_rows: int) -> tuple[Tensor, Tensor]:
    if index.dtype is torch.int16 or not _all_float32(R, H, centroids, scale):
        return reference.descent_block(R, H, index, centroids, strip, scale, group_rows)
    n, d = index.shape[1], centroids.shape[3]
    index, change = index.clone(memory_format=torch.contiguous_format), torch.empty(R.shape, device=R.device)
    metric = H.reshape(n, d, n, d).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    unit = torch.eye(d, device=H.device)
    inverse = torch.stack([reference.solve_small(metric, unit[i].expand(n, d)) for i in range(d)], -1)
    _by_block("descent_block", {"residual": R, "transposed": H.T, "inverse": inverse, "metric": metric}, centroids, strip, scale,
              index, change, group_rows)
    return index, change


def decode(index: Tensor, centroids: Tensor, strip: Tensor, scale: Tensor | None, group_rows: int) -> Tensor:
    if index.dtype is torch.int16 or not _all_float32(centroids, scale):
        return reference.decode(index, centroids, strip, scale, group_rows)
    (rows, n), (_, strips, k, d) = index.shape, centroids.shape
    Q = torch.empty(rows, n * d, device=index.device)
    launch("decode", "", {"index": aligned(index), "centroids": aligned(centroids), "strip": aligned(strip),
                          "scale": None if scale is None else aligned(scale), "out": Q, "rows": rows, "n": n, "strips": strips, "K": k},
           lambda b: ((cdiv(rows, b["R"]), cdiv(n, b["N"])), {"DIM": d, "GROUP_ROWS": group_rows, "SCALED": scale is not None}))
    return Q


def collect(index: Tensor, values: Tensor, strip: Tensor, group_rows: int, shape: tuple[int, int, int]) -> Tensor:
    if index.dtype is torch.int16 or not _all_float32(values):
        return reference.collect(index, values, strip, group_rows, shape)
    (rows, n), (groups, strips, k), size = index.shape, shape, values.shape[2]
    sums = torch.empty(*shape, size, dtype=torch.float64, device=index.device)
    member = (strip[None] == torch.arange(strips, device=strip.device)[:, None]).int()
    begin, end = member.argmax(1), n - member.flip(1).argmax(1)
    launch("collect", _up_to(k), {"index": aligned(index), "values": aligned(values), "strip": aligned(strip), "begin": begin, "end": end,
                                  "out": sums, "rows": rows, "n": n, "strips": strips, "K": k, "F": size},
           lambda b: ((groups, strips), {"GROUP_ROWS": group_rows, "BLOCK_K": power_of_two(k, least=16),
                                         "BLOCK_F": power_of_two(size, least=16)}))
    return sums
