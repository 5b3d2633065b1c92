"""Packed layers for gptvq._C.Linear, and what its kernels must compute: float64 on the integers that activations become."""
import itertools

import numpy as np
import pytest
import torch
from packed_cases import SPECS, random_codes, random_tables

from gptvq.backends import reference
from gptvq.spec import FORMATS, QuantSpec

_C = pytest.importorskip("gptvq._C", reason="gptvq is not built")
INSTRUCTION_SETS = _C.instruction_sets()
ACTIVATIONS = {"a16": 0, "a8": 1, "fp32": 2}
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
CANARY, MARGIN = 123.0, 64

# rows, cols, group_rows, group_cols, scale_block: whole tiles per group, with an odd tile and a narrower last strip; 4, 8, 2 and
# 1 rows per group; one group for all; groups and strips that cut tiles and blocks and so take the exact path
SHAPES = [
    (64, 256, 16, 64, 0), (80, 300, 16, 96, 0), (96, 576, 32, 192, 64), (77, 1030, 16, 256, 0), (70, 130, 64, 128, 16),
    (48, 512, 4, 256, 0), (50, 512, 4, 256, 64), (64, 256, 8, 64, 32), (24, 320, 8, 160, 16), (40, 200, 2, 64, 0),
    (40, 200, 1, 64, 16), (30, 129, 1, 64, 64), (33, 70, 64, 128, 32), (23, 90, 5, 32, 0), (32, 100, 16, 24, 0),
]
LAYERS = SPECS + [QuantSpec(rows, cols, dim, bits, group_rows, group_cols, scale)
                  for (dim, bits), (rows, cols, group_rows, group_cols, scale) in itertools.product(FORMATS, SHAPES)]


def raw(tensor, **change):
    """A tensor as gptvq._C takes it."""
    if tensor is None:
        return None
    fields = {"address": tensor.data_ptr(), "dtype": str(tensor.dtype)[6:], "shape": tuple(tensor.shape), "strides": tensor.stride()}
    return tuple({**fields, **change}.values())


def fields(spec):
    return spec.rows, spec.cols, spec.dim, spec.index_bits, spec.group_rows, spec.group_cols, spec.scale_block


class Layer:
    """Random packed weight [rows, cols] on one instruction set; `bias` float32 [rows] or whether to have one, `tables` as given."""

    def __init__(self, spec, instruction_set="", seed=0, bias=True, **tables):
        self.spec = spec
        names = ("idx", "cb", "gs", "sc", "table")
        self.tensors = dict(zip(names, (reference.pack_codes(random_codes(spec, seed), spec), *random_tables(spec, seed)))) | tables
        if isinstance(bias, bool):
            bias = torch.randn(spec.rows, generator=torch.Generator().manual_seed(seed)) if bias else None
        self.bias = bias
        self.weight = reference.dequantize(*self.tensors.values(), spec, torch.float32).double()
        self.handle = _C.Linear(*map(raw, self.tensors.values()), raw(self.bias), fields(spec), instruction_set)

    def run(self, x, activations="a16", threads=1):
        """y [tokens, rows] of x [tokens, cols], its memory poisoned before and watched on both sides."""
        size = len(x) * self.spec.rows
        memory = torch.full((size + 2 * MARGIN,), torch.nan, dtype=x.dtype)
        memory[:MARGIN] = memory[MARGIN + size :] = CANARY
        x = x.contiguous()
        self.handle.run(x.data_ptr(), TYPES[x.dtype], len(x), memory[MARGIN:].data_ptr(), ACTIVATIONS[activations], threads)
        assert (memory[:MARGIN] == CANARY).all() and (memory[MARGIN + size :] == CANARY).all(), "wrote past y"
        return memory[MARGIN : MARGIN + size].view(len(x), self.spec.rows)

    def oracle(self, x, activations="a16"):
        """(y, size of its terms) float64 [tokens, rows] for the activations that the kernels use in place of x [tokens, cols]."""
        if activations != "fp32" and self.handle.fast:
            x = torch.from_numpy(np.stack([as_integers(row, self.spec, activations) for row in x.float().numpy()]))
        bias = torch.zeros(self.spec.rows) if self.bias is None else self.bias
        return x.double() @ self.weight.T + bias, x.double().abs() @ self.weight.T.abs() + bias.abs()


def spans(spec):
    """Slices of columns with a common activation step: a scale block, else 256 columns; cut where a strip ends."""
    width = 16 if spec.scale_block == 16 else max(32, spec.scale_block or 256)
    for strip in range(0, spec.cols, spec.group_cols):
        stop = min(spec.cols, strip + spec.group_cols)
        yield from (slice(start, min(stop, start + width)) for start in range(strip, stop, width))


def as_integers(x, spec, activations):
    """float64 [cols] = step * integer for x float32 [cols]; the integers have 8 bits, or are 254 hi + lo of 8 bits each."""
    limit, out = np.float32(127 if activations == "a8" else 127 * 254 + 126), np.zeros(spec.cols)
    for span in spans(spec):
        peak = np.abs(x[span]).max()
        if peak > 1e-30:
            out[span] = np.rint(x[span] * (limit / peak)).astype(np.float64) * (peak / limit).astype(np.float64)
    return out


def relative(got, want):
    """Norm of the error over that of `want`."""
    return float((got.double() - want.double()).norm() / want.double().norm())
