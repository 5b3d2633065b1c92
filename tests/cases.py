"""One table of layers for the operator tests and benches: shapes, formats and the ways in which inputs go wrong."""
import zlib
from dataclasses import dataclass

import numpy as np
import torch

from gptvq.spec import QuantSpec


@dataclass(frozen=True)
class Case:
    """A layer: its format, and which kind of weights and Hessian it has.  `build` is deterministic."""

    name: str
    rows: int
    cols: int
    dim: int
    bits: int
    group_rows: int
    group_cols: int
    scale_block: int = 0
    weight: str = "gauss"
    hessian: str = "structured"

    @property
    def spec(self) -> QuantSpec:
        return QuantSpec(self.rows, self.cols, self.dim, self.bits, self.group_rows, self.group_cols, self.scale_block)

    def build(self, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
        """W [rows, cols], H [cols, cols]."""
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        return weights(self.weight, self.rows, self.cols, rng).to(dtype), hessian(self.hessian, self.cols, rng).to(dtype)


def weights(kind: str, rows: int, cols: int, rng: np.random.Generator) -> torch.Tensor:
    w = torch.from_numpy(rng.standard_normal((rows, cols)) * rng.uniform(0.5, 2, (rows, 1)) * 0.05)
    if kind == "transposed":
        return w.T.contiguous().T
    if kind == "strided":
        wide = torch.full((2 * rows, 3 * cols), torch.nan, dtype=w.dtype)
        wide[1::2, 2::3] = w
        return wide[1::2, 2::3]
    if kind == "one outlier":
        w[0, cols // 2] = 40
        return w
    return {"gauss": w, "zeros": torch.zeros_like(w), "constant": torch.full_like(w, 0.25),
            "duplicate rows": w[:1].expand(rows, cols), "few values": w.sign() * 0.125}[kind]


def hessian(kind: str, cols: int, rng: np.random.Generator) -> torch.Tensor:
    """2 / n X^T X of n tokens with correlated channels, a few of them loud."""
    tokens = {"structured": 4 * cols, "rank deficient": max(cols // 3, 1), "one token": 1}.get(kind, 4 * cols)
    mix = np.eye(cols) + 0.6 * np.eye(cols, k=1) + 0.4 * rng.standard_normal((cols, cols)) / np.sqrt(cols)
    loud = np.exp(rng.standard_normal(cols))
    x = rng.standard_normal((tokens, cols)) @ mix * loud
    if kind == "dead inputs":
        x[:, ::5] = 0
    if kind == "duplicate columns":
        x[:, 1::2] = x[:, :cols // 2 * 2:2]
    return torch.from_numpy({"identity": np.eye(cols), "zeros": np.zeros((cols, cols))}.get(kind, 2 / tokens * x.T @ x))


#: generic inputs: an operator must agree with the oracle index by index
GENERIC = [
    Case("1d K4", 8, 32, 1, 2, 4, 32),
    Case("1d K8 scales", 8, 64, 1, 3, 8, 32, 16),
    Case("1d K16 ragged group and strip", 11, 40, 1, 4, 4, 32),
    Case("2d K16", 8, 32, 2, 2, 8, 32),
    Case("2d K16 two strips, short last group", 13, 64, 2, 2, 8, 32),
    Case("2d K16 ragged strip, odd columns", 10, 45, 2, 2, 4, 32),
    Case("2d K16 scales, ragged block", 8, 56, 2, 2, 8, 64, 16),
    Case("2d K64 group larger than the layer", 12, 32, 2, 3, 64, 256),
    Case("4d K256 cols 50", 24, 50, 4, 2, 64, 64),
    Case("4d K256 scales", 24, 64, 4, 2, 24, 64, 32),
    Case("2d K16 strided", 8, 32, 2, 2, 4, 16, 0, "strided"),
    Case("2d K16 transposed scales", 8, 32, 2, 2, 4, 32, 16, "transposed"),
    Case("4d +-K256", 28, 64, 4, 3, 32, 64),
    Case("4d +-K256 scales, ragged block", 27, 60, 4, 3, 32, 64, 32),
    Case("2d K16 dead inputs", 8, 40, 2, 2, 8, 20, 0, "gauss", "dead inputs"),
    Case("2d K16 rank deficient", 8, 36, 2, 2, 8, 36, 0, "gauss", "rank deficient"),
]

#: degenerate inputs: ties and empty clusters everywhere, so only what any answer must satisfy can be checked
DEGENERATE = [
    Case("zeros", 6, 32, 2, 2, 4, 32, 0, "zeros"),
    Case("zeros scales", 6, 32, 2, 2, 4, 32, 16, "zeros"),
    Case("constant 1d", 6, 33, 1, 2, 4, 32, 0, "constant"),
    Case("constant 2d scales", 6, 32, 2, 2, 4, 32, 16, "constant"),
    Case("constant 4d cols 50", 6, 50, 4, 2, 4, 32, 0, "constant"),
    Case("duplicate rows", 8, 32, 2, 2, 8, 32, 0, "duplicate rows"),
    Case("few values 1d", 8, 32, 1, 3, 8, 32, 0, "few values"),
    Case("few values 2d", 8, 32, 2, 3, 8, 32, 0, "few values"),
    Case("fewer points than centroids", 2, 16, 4, 2, 2, 16),
    Case("one row, one vector", 1, 4, 4, 2, 1, 4),
    Case("one weight", 1, 1, 1, 2, 1, 4),
    Case("one weight, dim 2", 1, 1, 2, 2, 1, 4),
    Case("one token", 8, 32, 2, 2, 8, 32, 0, "gauss", "one token"),
    Case("no tokens, odd columns", 8, 31, 2, 2, 8, 32, 0, "gauss", "zeros"),
    Case("duplicate columns", 8, 32, 2, 2, 8, 32, 0, "gauss", "duplicate columns"),
    Case("one outlier", 8, 32, 2, 2, 8, 32, 16, "one outlier"),
    Case("zeros 4d signed", 6, 32, 4, 3, 4, 32, 0, "zeros"),
    Case("few values 4d signed, cols 50", 8, 50, 4, 3, 8, 64, 16, "few values"),
    Case("4d signed, one row, one vector", 1, 3, 4, 3, 1, 4),
]


def ids(case: Case) -> str:
    return case.name
