"""The least-squares problem of one layer: decode codes to weights, measure the loss, collect gradients per centroid."""
from __future__ import annotations

import math

import torch
from torch import Tensor

from . import ops
from .errors import NumericalError
from .ranks import Rows
from .scaling import fit_scales, scale_norm, scale_reach, scales_of
from .spec import QuantSpec


def solving_bytes(rows: int, spec: QuantSpec) -> int:
    """Most memory that solving `rows` rows of a layer takes beside its Hessian's sum: factorization, or the codebook update."""
    n = spec.vectors * spec.dim
    return 4 * max(9 * n * n + 2 * rows * n, 6 * n * n + (10 + spec.dim) * rows * n)


def working_bytes(specs: list[QuantSpec]) -> int:
    """Most memory that solving these layers one after the other takes, with a Hessian of each, as experts have them, and a drift."""
    solving = max((solving_bytes(spec.rows, spec) + 4 * max(spec.rows, spec.cols) * spec.cols for spec in specs), default=0)
    return solving + sum(4 * spec.cols ** 2 for spec in specs)


def solvable(spec: QuantSpec, free: int) -> str:
    """What fits into `free` bytes of a GPU, as advice."""
    n = spec.vectors * spec.dim
    rows = min((free // 4 - 9 * n * n) // (2 * n), (free // 4 - 6 * n * n) // ((10 + spec.dim) * n))
    smaller = f"{rows} rows of {spec.cols} columns would fit" if rows > 0 else f"no layer of {spec.cols} columns would fit"
    return f"{smaller}; free memory, use a larger GPU, or device='cpu'"


def unit_of(weight: Tensor, name: str) -> float:
    """The power of two that `weight` is solved in units of, lest squares under- or overflow: 1 unless it lies far beside all usual ones.

    Raises NumericalError where what is stored could overflow.
    """
    least, largest = weight.detach().aminmax()
    peak = max(-float(least), float(largest))
    if not math.isfinite(peak) or peak == 0 or 2.0 ** -40 < peak < 2.0 ** 40:
        return 1.0
    if peak > 2.0 ** 120:
        raise NumericalError(f"{name}: got weights up to {peak:.3g}, need them below {2.0 ** 120:.3g} for float32 to hold what is stored")
    return 2.0 ** (math.frexp(peak)[1] - 1)


def in_units(weight: Tensor, unit: float, dtype: torch.dtype) -> Tensor:
    """weight / unit in `dtype`."""
    return (weight if unit == 1 else weight.double() / unit).to(dtype)


def gs_of(gs: Tensor, unit: float) -> Tensor:
    """The scales of codebooks for weights in units of `unit` -> those for the weights; exact but for the very smallest."""
    return (gs.double() * unit).to(gs.dtype)


class Problem:
    """Weights W [rows, n] and Hessian H [n, n] of a layer, n = vectors * dim (columns past the layer's are zero).

    An `index` is [rows, vectors] of `spec.code_dtype`, `centroids` [row groups, strips, K, d], both in natural column order.
    Block scales live here because every decode needs them: `scale` is [rows, vectors] or None.  `rows`: of which share of a
    layer the weights are; scales and errors are those of the whole layer.  `method` as of a Recipe.
    """

    def __init__(self, weight: Tensor, hessian: Tensor, spec: QuantSpec, rows: Rows | None = None, method: str = "gptvq"):
        n = spec.vectors * spec.dim
        self.spec = spec
        self.rows, self.method = rows or Rows(spec), method
        self.W = torch.nn.functional.pad(weight, (0, n - spec.cols))
        self.H = hessian
        self.strip = torch.arange(spec.vectors, device=weight.device) * spec.dim // spec.group_cols
        self.group = torch.arange(spec.rows, device=weight.device) // spec.group_rows
        self.power = weight_loss(self.W, self.H, self.rows)
        if not self.power:          # weights where no input is: what they are is measured as if all inputs counted the same
            self.power = _loss(self.W, self.W * self.H.diagonal().mean(), self.rows)
        self.scale: Tensor | None = None
        if spec.scale_block:
            self.scale_codes = torch.zeros(spec.rows, spec.scale_blocks, dtype=torch.uint8, device=weight.device)
            self.sz = torch.zeros(spec.scale_blocks, 2, dtype=torch.float16, device=weight.device)
            self.scale = weight.new_ones(spec.rows, spec.vectors)

    def rescale(self, W: Tensor, first: int, last: int) -> None:
        """Takes the scales of columns [first, last) from the current weights W [rows, last - first]."""
        if self.scale is None:
            return
        block = self.spec.scale_block
        codes, sz = fit_scales(W[:, : self.spec.cols - first], block, self.rows, scale_norm(self.spec, self.method), scale_reach(self.method))
        at = slice(first // block, first // block + codes.shape[1])
        self.scale_codes[:, at], self.sz[at] = codes, sz
        vector = torch.arange(first // self.spec.dim, -(-last // self.spec.dim), device=W.device)
        self.scale[:, vector] = scales_of(codes, sz).to(self.scale.dtype)[:, (vector * self.spec.dim - first) // block]

    def decode(self, index: Tensor, centroids: Tensor) -> Tensor:
        """Q [rows, n]."""
        return ops.decode(index, centroids, self.strip, self.scale, self.spec.group_rows)

    def collect(self, index: Tensor, values: Tensor) -> Tensor:
        """values [rows, vectors, f] summed per centroid in float64 -> [row groups, strips, K, f]."""
        spec = self.spec
        return ops.collect(index, values, self.strip, spec.group_rows, (spec.row_groups, spec.strips, spec.codewords))

    def gradient(self, index: Tensor, residual: Tensor) -> Tensor:
        """Half the descent direction of the loss in the centroids, collect((W - Q) H s), as float64 [.., K, d]."""
        return self.gather(index, ops.matmul_split(residual, self.H))

    def gather(self, index: Tensor, pull: Tensor) -> Tensor:
        """The same from pull = (W - Q) H [rows, n]."""
        pull = pull.view(self.spec.rows, self.spec.vectors, self.spec.dim)
        return self.collect(index, pull if self.scale is None else pull * self.scale.unsqueeze(-1))

    def curvature(self, index: Tensor) -> Tensor:
        """The d x d diagonal blocks sum s^2 H_PP of each centroid, without the coupling of vectors: [.., K, d, d]."""
        spec, d = self.spec, self.spec.dim
        blocks = self.H.view(spec.vectors, d, spec.vectors, d).diagonal(dim1=0, dim2=2).permute(2, 0, 1).reshape(1, -1, d * d)
        values = blocks.expand(spec.rows, -1, -1) if self.scale is None else blocks * self.scale.square().unsqueeze(-1)
        return self.collect(index, values).unflatten(-1, (d, d))

    def error(self, index: Tensor, centroids: Tensor, pull: Tensor | None = None) -> float:
        """Relative layer error tr((W - Q) H (W - Q)^T) / tr(W H W^T); pull: (W - Q) H, where it is known."""
        return self.measure(index, centroids, pull)[0]

    def measure(self, index: Tensor, centroids: Tensor, pull: Tensor | None = None, product=ops.matmul) -> tuple[float, Tensor]:
        """(the error, (W - Q) H [rows, n]); product: what computes the latter, where it is not given."""
        residual = self.W - self.decode(index, centroids)
        pull = product(residual, self.H) if pull is None else pull
        loss = _loss(residual, pull, self.rows)
        return loss / self.power if self.power > 0 else 0.0 if loss == 0 else float("inf"), pull


def weight_loss(W: Tensor, H: Tensor, rows: Rows) -> float:
    """tr(W H W^T) of the layer, summed in float64, W the rows of a share."""
    return _loss(W, ops.matmul(W, H), rows)


def _loss(W: Tensor, WH: Tensor, rows: Rows) -> float:
    # A copy, as WH goes on to the next stage.  Row by row, then exactly: the same for any number of threads and shares.
    each = rows.join(WH.to(torch.float64, copy=True).mul_(W).sum(1)).tolist()
    return math.fsum(each) if all(map(math.isfinite, each)) else math.nan
