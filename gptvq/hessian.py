"""Hessian of a layer's inputs, and the factor of its damped inverse that the solver propagates errors with."""
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops
from .errors import NumericalError

DAMP_STEPS = (1, 2, 5, 10, 100)     # repair ladder: multiples of the asked damping
DIAGONAL = "diagonal only"
_ENOUGH = 4                         # tokens per column that determine a Hessian well enough
_BAND = 128                         # rows of a packed sum that begin in one column
_LEAF = {"cpu": 96, "cuda": 2048}   # rows that are factorized at once


@dataclass
class Counts:
    """Of tokens: those in a sum, and those dropped; `lost` of the former turn out to be dropped, as a GPU knows that nobody waited for."""

    tokens: int = 0
    dropped: int = 0
    lost: Tensor | None = None

    def __add__(self, other: Counts) -> Counts:
        lost = [counts.lost for counts in (self, other) if counts.lost is not None]
        return Counts(self.tokens + other.tokens, self.dropped + other.dropped, sum(lost[1:], lost[0]) if lost else None)

    def read(self) -> tuple[int, int]:
        """(tokens, dropped); waits for a GPU that has not said yet which."""
        if self.lost is not None:
            lost, self.lost = int(self.lost), None
            self.tokens, self.dropped = self.tokens - lost, self.dropped + lost
        return self.tokens, self.dropped


class Hessian:
    """H = (2 / n) sum_t x_t x_t^T over n tokens x_t of a layer's [.., cols] inputs; layers with one input share one.

    `sum` is float32 on `device`; only its upper triangle counts.  Batches with non-finite values are left out and counted;
    `matrix` raises NumericalError when they make up more than 1 % of the tokens.  `borrowed` of the tokens that `sum` counts are
    other layers' (see `borrow`).
    """

    def __init__(self, cols: int, device: torch.device | str | None = None):
        self.sum = torch.zeros(cols, cols, dtype=torch.float32, device=device)
        self.counts = Counts()
        self.borrowed = 0
        self._given = False             # a matrix, not a sum over tokens
        self._matrix: Tensor | None = None
        self._factors: dict[tuple, HessianFactor] = {}

    @classmethod
    def from_matrix(cls, matrix: Tensor, tokens: int = 0) -> Hessian:
        """Wraps a given H [cols, cols]."""
        self = cls(0)
        self.sum, self.counts, self._given = matrix, Counts(tokens), True
        return self

    @classmethod
    def from_packed(cls, flat: Tensor, cols: int, device: torch.device | str | None, counts: Counts) -> Hessian:
        """With the sum that `packed` gave."""
        self = cls(cols, device)
        self.counts = counts
        for first, band in _bands(flat, cols):
            self.sum[first: first + _BAND, first:] = band
        return self

    def packed(self) -> Tensor:
        """The upper triangle of `sum`, flat: bands of 128 rows, each from its diagonal on."""
        flat = self.sum.new_empty(packed_size(len(self.sum)))
        for first, band in _bands(flat, len(self.sum)):
            band.copy_(self.sum[first: first + _BAND, first:])
        return flat

    @property
    def tokens(self) -> int:
        """That `sum` counts; waits like `Counts.read`."""
        return self.counts.read()[0]

    @property
    def dropped(self) -> int:
        """Tokens of batches with non-finite values; waits like `Counts.read`."""
        return self.counts.read()[1]

    def add(self, x: Tensor) -> Tensor | None:
        """x [.., cols] inputs of any float dtype -> what counts of them, [n, cols]: x or, where it is not finite, None or zeros."""
        x = x.detach().reshape(-1, x.shape[-1]).to(self.sum.device)
        counted = finite(x)
        if counted is None:
            self.counts += Counts(dropped=len(x))
            return None
        counted, sound = counted
        self.counts += Counts(len(x), lost=None if sound is None else (~sound).long() * len(x))
        ops.gram(self.sum, counted)
        self._matrix = None
        self._factors.clear()
        return counted

    def matrix(self) -> Tensor:
        """H [cols, cols] float32, to be read only; zeros where no token was seen."""
        if self.dropped > 0.01 * (self.tokens + self.dropped):
            raise NumericalError(f"{self.dropped} of {self.tokens + self.dropped} calibration tokens gave non-finite activations; "
                                 "at most 1 % may be dropped. Check the model's dtype (try dtype=float32) and the text")
        if self._given:
            return checked(self.sum)
        if self._matrix is None:
            upper = self.sum.triu() * (2 / max(self.tokens + self.borrowed, 1))
            self._matrix = checked(upper + upper.triu(1).T)
        return self._matrix

    def repairs(self) -> list[str]:
        """What was done about the data, for the record of a layer; [] where nothing had to be."""
        found = []
        if self.dropped:
            found.append(f"{self.dropped} of {self.tokens + self.dropped} tokens dropped: not finite")
        if self.borrowed:
            found.append(f"{self.tokens} tokens: {self.borrowed / (self.tokens + self.borrowed):.0%} from other experts")
        if self._given:
            given = wide(self.sum) / 2
            if float((given - given.T).abs().max()) > 1e-5 * float(given.abs().max()):
                found.append("symmetrized")
        return found

    def dead(self) -> int:
        """Inputs that were always zero; the damping alone decides about their weights."""
        return int((self.matrix().diagonal() == 0).sum())

    def factor(self, key: tuple, columns: Tensor, damp: float, dtype: torch.dtype, shrink: float = 0.0) -> HessianFactor:
        """The factor of H + shrink diag H for the padded column order `columns`, cached under `key` for the layers that share this Hessian.

        In other text correlations are others than in the calibration's; `shrink` divides them by 1 + shrink, whatever an input's scale is.
        """
        key = (*key, damp, dtype, shrink)
        if key not in self._factors:
            matrix = pad(self.matrix(), len(columns))[columns][:, columns]
            matrix.diagonal().mul_(1 + shrink)
            self._factors[key] = factorize(matrix, damp, dtype)
        return self._factors[key]


@dataclass(frozen=True)
class HessianFactor:
    """U upper triangular with U^T U = (H + damp * mean diag H * I)^-1; `repair` says what it took, "" if nothing."""

    U: Tensor
    damp: float
    repair: str
    unweighted: bool = False            # H was zero, or nothing on its diagonal was positive: U is the identity's

    @property
    def changed(self) -> bool:
        """Whether another H than the given one was factorized."""
        return self.repair not in ("", "float64")

    def weighting(self, H: Tensor) -> Tensor:
        """H [cols, cols] as far as the factor could use it: positive semidefinite, or a descent along it would never end."""
        diagonal = H.diagonal().clamp_min(0)
        if self.unweighted:
            return torch.eye(len(H), dtype=H.dtype, device=H.device)
        if self.repair == DIAGONAL:
            return torch.diag(diagonal)
        if self.repair.startswith("damping"):
            return H + self.damp * diagonal.mean() * torch.eye(len(H), dtype=H.dtype, device=H.device)
        return H


def looking_is_free(device: torch.device) -> bool:
    """Whether it costs nothing to look at a value on `device`: a GPU would have to finish all that it was given before."""
    return device.type == "cpu"


def finite(x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """(x, None), or None where x is not finite; where that would make a GPU wait, (x or zeros, which of them as a bool on the device).

    A NaN or inf survives the sum, a tenth of isfinite's cost.
    """
    total = x.sum(dtype=torch.float32)
    if looking_is_free(x.device):
        return (x, None) if math.isfinite(float(total)) else None
    sound = torch.isfinite(total)
    return torch.where(sound, x, torch.zeros((), dtype=x.dtype, device=x.device)), sound


def borrow(hessians: Sequence[Hessian]) -> None:
    """Fills up the Hessians of alike layers (one matrix of every expert) that saw fewer than 4 tokens per column, in place.

    So few tokens do not determine H.  What is missing comes as an average token of all these layers together, which is better than
    nothing by far: experts differ in their inputs, but outliers and correlations are much the same.
    """
    tokens = sum(hessian.tokens for hessian in hessians)
    poor = [hessian for hessian in hessians if hessian.tokens < _ENOUGH * len(hessian.sum) and not hessian.borrowed]
    if not poor or not tokens:
        return
    mean = sum(hessian.sum for hessian in hessians) / tokens
    for hessian in poor:
        hessian.borrowed = _ENOUGH * len(hessian.sum) - hessian.tokens
        hessian.sum += mean * hessian.borrowed
        hessian._matrix = None
        hessian._factors.clear()


def packed_size(cols: int) -> int:
    """Elements of a packed sum [cols, cols], half of it and a little."""
    return sum(min(_BAND, cols - first) * (cols - first) for first in range(0, cols, _BAND))


def checked(matrix: Tensor) -> Tensor:
    """A square, finite Hessian, symmetrized, in float32 where it is in fewer digits; raises NumericalError for any other."""
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise NumericalError(f"Hessian: got shape {tuple(matrix.shape)}, need a square matrix")
    matrix = wide(matrix)
    if not bool(torch.isfinite(matrix).all()):
        raise NumericalError("Hessian: got non-finite entries; check the calibration activations")
    return (matrix / 2).add_(matrix.T, alpha=0.5)       # halves, as a sum of large ones could overflow


def wide(x: Tensor) -> Tensor:
    """x as it is in float32 and float64, as float32 in any other type."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _bands(flat: Tensor, cols: int) -> Iterator[tuple[int, Tensor]]:
    """(first row and column, [rows, columns]) of the bands of a packed sum, as views."""
    for first in range(0, cols, _BAND):
        shape = min(_BAND, cols - first), cols - first
        band, flat = flat[: math.prod(shape)], flat[math.prod(shape):]
        yield first, band.view(shape)


def pad(matrix: Tensor, size: int) -> Tensor:
    """Zero rows and columns up to [size, size]: inputs that do not exist and so cost nothing."""
    extra = size - matrix.shape[0]
    return torch.nn.functional.pad(matrix, (0, extra, 0, extra)) if extra else matrix


def factorize(matrix: Tensor, damp: float, dtype: torch.dtype = torch.float32) -> HessianFactor:
    """Damps and factorizes H [n, n]; climbs the repair ladder until the factor reproduces the inverse.

    Ladder: float32, float64, damping x 2, 5, 10, 100 in float64, the diagonal alone.  A Hessian of zeros (a layer that
    saw no token) counts as the identity: plain least squares on the weights; so does one without a positive entry on its diagonal.
    """
    diag = matrix.diagonal().double()
    mean = diag.clamp_min(0).mean()
    if not mean > 0:
        why = "nothing positive on its diagonal" if bool(matrix.any()) else "no calibration data"
        return HessianFactor(torch.eye(len(matrix), dtype=dtype, device=matrix.device), damp, f"{why}: unweighted", True)
    attempts = [(1, dtype), (1, torch.float64)] if dtype != torch.float64 else [(1, torch.float64)]
    attempts += [(step, torch.float64) for step in DAMP_STEPS[1:]]
    for step, precision in attempts:
        damped = matrix.to(precision) / mean        # U scales by mean^-1/2; near 1 the ladder does not depend on H's units
        damped.diagonal().add_(damp * step)
        U = _inverse_upper(damped)
        if U is not None:
            repair = "" if (step, precision) == attempts[0] else "float64" if step == 1 else f"damping x {step}"
            return HessianFactor((U / mean.sqrt()).to(dtype), damp * step, repair)
    diagonal = torch.diag(((diag.clamp_min(0) / mean) + damp).rsqrt() / mean.sqrt())
    return HessianFactor(diagonal.to(dtype), damp, DIAGONAL)


def _inverse_upper(A: Tensor) -> Tensor | None:
    """Upper U with U^T U = A^-1, or None where A is not positive definite enough for its precision.

    With J the reversal and J A J = L L^T, U = J L^-1 J: no A^-1.
    """
    root = _inverse_lower(A.flip(0, 1))
    if root is None:
        return None
    U = root.flip(0, 1)
    probe = A @ (U.T @ (U @ torch.ones(len(A), 1, dtype=A.dtype, device=A.device)))
    return U if bool(torch.isfinite(U).all()) and float((probe - 1).abs().max()) < 1e-2 else None


def _inverse_lower(A: Tensor) -> Tensor | None:
    """L^-1 of A = L L^T, by halves, so that nearly all of it is products; None where A is not positive definite."""
    if len(A) <= _LEAF.get(A.device.type, 2048):
        L, info = torch.linalg.cholesky_ex(A)
        eye = torch.eye(len(A), dtype=A.dtype, device=A.device)
        return None if int(info) else torch.linalg.solve_triangular(L, eye, upper=False)
    half = len(A) // 2
    first = _inverse_lower(A[:half, :half])
    if first is None:
        return None
    below, rest = ops.matmul(A[half:, :half], first.T), A[half:, half:].clone()
    ops.submatmul(rest, below, below.T)
    second = _inverse_lower(rest)
    if second is None:
        return None
    root = torch.zeros_like(A)
    root[:half, :half], root[half:, half:] = first, second
    ops.submatmul(root[half:, :half], second, ops.matmul(below, first))
    return root
