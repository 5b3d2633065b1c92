"""y = W x by the CUDA kernels, against float64 on the integers that activations become, and against float64 as such."""
import pytest
import torch
from linear_cases import as_integers, relative
from packed_cases import random_codes, random_tables, spec_id

from gptvq import ops
from gptvq.backends import cuda_linear, reference
from gptvq.spec import FORMATS, QuantSpec

# rows, cols, group_rows, group_cols, scale_block: whole strips of 256; several chunks in a strip, ragged rows; narrow strips and a
# narrower last one; one group; a group of several tiles
SHAPES = [(48, 512, 16, 256, 0), (37, 1100, 48, 544, 0), (64, 512, 32, 256, 64), (33, 448, 16, 192, 64), (20, 300, 64, 512, 64),
          (40, 352, 32, 160, 32), (24, 272, 16, 96, 0), (35, 560, 48, 128, 16), (32, 200, 32, 32, 0)]
# groups of less than a tile, where tables lie in registers
SMALL = [(40, 512, 4, 256, 0), (36, 300, 8, 64, 64), (22, 320, 2, 160, 16), (50, 288, 6, 288, 64)]
SPECS = [QuantSpec(r, c, *form, *rest) for form in sorted(FORMATS) for r, c, *rest in SHAPES]
SPECS += [QuantSpec(r, c, *form, *rest) for form in ((1, 2), (1, 3), (1, 4), (2, 2)) for r, c, *rest in SMALL]
SPECS += [QuantSpec(r, c, 1, bits, *rest) for bits in (2, 3, 4) for r, c, *rest in [(18, 512, 1, 256, 0), (21, 300, 3, 32, 32)]]
# groups that cut blocks of columns, or rows that need to share a codebook: computed in float32
EXACT = [QuantSpec(30, 200, *form, 5, 24, scale) for form, scale in zip(sorted(FORMATS), (0, 0, 0, 0, 0, 0, 0))]
EXACT += [QuantSpec(30, 130, 2, 3, 4, 64, 32), QuantSpec(30, 130, 4, 2, 8, 64, 16)]
ORDERS = ("forward", "reverse", "round robin", "random")
OUTPUT = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}     # rounding of y, relative


class Layer:
    def __init__(self, spec, machine, seed=0, bias=True):
        self.spec = spec
        tensors = reference.pack_codes(random_codes(spec, seed), spec), *random_tables(spec, seed)
        self.weight = reference.dequantize(*tensors, spec, torch.float32).double()
        self.bias = torch.randn(spec.rows, generator=torch.Generator().manual_seed(seed)) if bias else None
        self.tensors = [None if t is None else t.to(machine.device) for t in (*tensors, self.bias)]
        self.prepared = ops.prepare_linear(*self.tensors, spec)

    def want(self, x, activations):
        """(y, size of its terms) float64 [tokens, rows] for the activations that the kernels use in place of x."""
        x = x.cpu()
        if activations != "fp32" and self.prepared.kernel.fast:
            x = torch.stack([torch.from_numpy(as_integers(row, self.spec, activations)) for row in x.float().numpy()])
        bias = torch.zeros(self.spec.rows) if self.bias is None else self.bias
        return x.double() @ self.weight.T + bias, x.double().abs() @ self.weight.T.abs() + bias.abs()

    def check(self, x, activations):
        y, (want, size) = self.prepared(x, activations), self.want(x, activations)
        assert y.dtype == x.dtype and y.shape == want.shape
        error = (y.cpu().double() - want).abs()
        assert bool((error <= size * 1e-6 + want.abs() * OUTPUT[x.dtype] + 1e-7).all()), float((error / (size + 1e-7)).max())


def inputs(machine, tokens, cols, dtype=torch.float32, seed=0):
    x = torch.randn(tokens, cols, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype).to(machine.device)


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_every_format_and_shape(machine, spec):
    layer = Layer(spec, machine, bias=spec.rows % 2 == 0)
    assert layer.prepared.kernel.fast
    at = SPECS.index(spec)
    for _ in machine.orders((ORDERS[at % 4],)):
        layer.check(inputs(machine, 1, spec.cols, list(OUTPUT)[at % 3]), "a16")
    for _ in machine.orders((ORDERS[(at + 1) % 4],)):
        layer.check(inputs(machine, (2, 3, 5, 8, 9)[at % 5], spec.cols, list(OUTPUT)[(at + 1) % 3]), ("a16", "a8")[at % 2])
