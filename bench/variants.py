"""What could be done otherwise with the scales and groups of a format, for bench.tried; none of it is in the package."""
from __future__ import annotations

from unittest import mock

import torch
from torch import Tensor

from gptvq import codebook, ops, problem, solver
from gptvq import spec as spec_module
from gptvq.backends import reference
from gptvq.config import Recipe
from gptvq.hessian import Hessian
from gptvq.problem import Problem
from gptvq.scaling import scale_table
from gptvq.spec import QuantSpec

from . import layers


class Variant:
    """The recipe on one format; the subclasses change one thing each."""

    def __init__(self, spec: QuantSpec):
        self.spec, self.bits = spec, spec.bits_per_value

    def problem(self, W: Tensor, H: Tensor) -> Problem:
        return Problem(W, H, self.spec)

    def between(self, best: solver.Best) -> None:
        """Behind every stage."""

    def error(self, layer: layers.Layer, recipe: Recipe) -> dict[str, float]:
        """{side: error}."""
        hessian, spec = Hessian.from_matrix(layer.hessians["calibration"].matrix()), self.spec
        made = self.problem(layer.weight, hessian.matrix())
        order = solver._visiting_order(made, recipe)
        columns = (order[:, None] * spec.dim + torch.arange(spec.dim)).flatten()
        factor = hessian.factor((recipe.order, spec.dim), columns, recipe.damp, made.W.dtype, recipe.shrink)
        for best in solver.stages(made, factor, order, recipe):
            self.between(best)
        Q = made.decode(best.index, best.codebooks.centroids)[:, : spec.cols]
        return {side: layer.error(Q, side) for side in layers.SIDES}


class Norm(Variant):
    """Block scales by another norm than `scaling.scale_norm` chooses."""

    def __init__(self, spec: QuantSpec, norm: int):
        super().__init__(spec)
        self.norm = norm

    def error(self, layer, recipe):
        with mock.patch.object(problem, "scale_norm", lambda spec, method: self.norm):
            return super().error(layer, recipe)


class Search(Variant):
    """Block scales of least loss for the codes as they are, one block column after the other."""

    def between(self, best):
        made, spec = best.problem, self.spec
        ones = ops.decode(best.index, best.codebooks.centroids, made.strip, None, spec.group_rows)
        R = best.pull.clone()
        for b in range(spec.scale_blocks):
            at = slice(b * spec.scale_block, min((b + 1) * spec.scale_block, len(made.H)))
            C, now = ones[:, at], made.scale[:, at.start // spec.dim]
            curve = ((C @ made.H[at, at]) * C).sum(1).double()              # the loss of a scale s: curve (s - wish)^2 + constant
            wish = torch.where(curve > 0, now + (C * R[:, at]).sum(1) / curve.clamp_min(1e-30), now.double())
            sz, codes = _nearest_grid(made.sz[b], made.scale_codes[:, b], wish, curve)
            scale = scale_table(sz[None])[0][codes.long()]
            R -= ((scale - now)[:, None] * C) @ made.H[at]
            made.sz[b], made.scale_codes[:, b], made.scale[:, at.start // spec.dim: at.stop // spec.dim] = sz, codes, scale[:, None]
        best.error, best.pull = made.measure(best.index, best.codebooks.centroids)


def _nearest_grid(sz: Tensor, codes: Tensor, wish: Tensor, curve: Tensor) -> tuple[Tensor, Tensor]:
    """(z, a) and codes of the least sum of curve (scale - wish)^2 met: on the grid as it is, then on lines fitted to log2 wish."""
    def on(sz):
        table = scale_table(sz[None])[0].double()
        codes = (table - wish[:, None]).abs().argmin(1)
        return float((curve * (table[codes] - wish).square()).sum()), sz, codes

    best = tried = on(sz)
    weight, log = curve * wish.clamp_min(0).square(), wish.clamp_min(1e-30).log2()
    for _ in range(3):
        code = tried[2].double()
        total = weight.sum().clamp_min(1e-300)
        x, y = code - (weight * code).sum() / total, log - (weight * log).sum() / total
        if not bool((weight * x * x).sum() > 0):
            break
        slope = (weight * x * y).sum() / (weight * x * x).sum()
        line = torch.stack([(weight * (log - slope * code)).sum() / total, slope]).to(torch.float16)
        if not bool(torch.isfinite(line).all()) or line[1] < 0:
            break
        tried = on(line)
        best = min(best, tried, key=lambda found: found[0])
    return best[1], best[2].to(codes.dtype)


class RowScales(Variant):
    """A scale for each row, in a format that has none."""

    def __init__(self, spec: QuantSpec, power: float):
        super().__init__(spec)
        self.power = power
        self.bits += 16 / spec.cols

    def problem(self, W, H):
        made = super().problem(W, H)
        size = W.square().mean(1).sqrt().pow(self.power).clamp_min(1e-30)
        made.scale = (size / size.mean()).half().float().clamp_min(2.0 ** -14)[:, None].repeat(1, self.spec.vectors)
        made.rescale = lambda W, first, last: None
        return made


def tall(spec: QuantSpec) -> Variant:
    """All rows in one group, as many columns as keep its size, and no less than four."""
    cols = max(spec.group_rows * spec.group_cols // spec.rows // 4 * 4, 4)
    return Variant(QuantSpec(spec.rows, spec.cols, spec.dim, spec.index_bits, spec.rows, min(cols, spec.cols)))


def one_codebook(spec: QuantSpec) -> Variant:
    """The signed format, one codebook for all of the layer, as many scales."""
    return Variant(QuantSpec(spec.rows, spec.cols, 4, 3, spec.rows, spec.cols, spec.scale_block))


class Wide(Variant):
    """Four dimensions, 4096 centroids for all of the layer, as many scales: indices of 12 bits without signs, which no kernel of ours decodes."""

    formats = mock.patch.object(spec_module, "SIGNED", ())
    without_kernels = mock.patch.multiple(ops, decode=reference.decode, collect=reference.collect, descent_block=reference.descent_block)

    def __init__(self, spec: QuantSpec):
        with self.formats:
            super().__init__(QuantSpec(spec.rows, spec.cols, 4, 3, spec.rows, spec.cols, spec.scale_block))

    def error(self, layer, recipe):
        with self.formats, self.without_kernels, mock.patch.object(solver, "column_pass", self.column_pass):
            return super().error(layer, recipe)

    def column_pass(self, made, factor, order, recipe, centroids):
        """`solver.column_pass` with indices that do not fit a byte."""
        columns = (order[:, None] * 4 + torch.arange(4)).flatten()
        roots, metric = solver.metrics(factor.U, 4, recipe.method)
        if centroids is None:
            centroids, natural = made.W.new_zeros(1, 1, self.spec.codewords, 4), torch.empty_like(metric)
            natural[order] = metric
            made.rescale(made.W, 0, self.spec.cols)
            solver.fit_strip(made, centroids, 0, made.W, natural, recipe)
        W, index = made.W[:, columns], torch.empty(self.spec.rows, self.spec.vectors, dtype=torch.long)
        for i, at in enumerate(order.tolist()):
            here, scale = slice(4 * i, 4 * i + 4), made.scale[:, at, None]
            index[:, at] = reference.assign(W[:, here] / scale, roots[i] @ roots[i].T, centroids[:, 0], self.spec.rows)
            E = (W[:, here] - centroids[0, 0, index[:, at]] * scale) @ roots[i]
            W[:, here.stop:] -= E @ factor.U[here, here.stop:]
        return index, centroids


class Signed(Wide):
    """As Wide, but half of the 4096 are stored: the others are those with all their signs changed."""

    stored = 2048

    def __init__(self, spec: QuantSpec):
        super().__init__(spec)
        self.bits -= (4096 - self.stored) * 4 * 8 / (spec.rows * spec.cols)
        self.without_kernels = mock.patch.multiple(
            ops, descent_block=lambda R, H, index, centroids, *rest: reference.descent_block(R, H, index, self.all_of(centroids), *rest))

    def all_of(self, centroids: Tensor) -> Tensor:
        """[.., stored, 4] -> [.., 4096, 4]."""
        return torch.cat([centroids, -centroids], -2)

    def problem(self, W: Tensor, H: Tensor) -> Problem:
        made = super().problem(W, H)
        made.decode = lambda index, centroids: reference.decode(index, self.all_of(centroids), made.strip, made.scale, self.spec.group_rows)
        made.collect = lambda index, values: self.collect(made, index, values)
        return made

    def collect(self, made: Problem, index: Tensor, values: Tensor) -> Tensor:
        flips = (1 - 2 * (index.long() // self.stored)).unsqueeze(-1).to(values.dtype)
        flips = flips if values.shape[-1] == 4 else flips.square()          # blocks of H
        return reference.collect(index % self.stored, values * flips, made.strip, self.spec.group_rows, (1, 1, self.stored))

    def column_pass(self, made, factor, order, recipe, centroids):
        if centroids is None:                                   # fitted to the weights with their signs taken away
            metric = solver.metrics(factor.U, 4, recipe.method)[1]
            natural = torch.empty_like(metric)
            natural[order] = metric
            made.rescale(made.W, 0, self.spec.cols)
            x = made.W.view(self.spec.rows, -1, 4) / made.scale[..., None]
            x = torch.where(x.sum(-1, keepdim=True) < 0, -x, x)
            centroids = codebook.fit(x.flatten(0, 1)[None], natural, made.scale.square().flatten()[None], self.stored, recipe.em_iterations,
                                     recipe.em_starts)[None]
        return super().column_pass(made, factor, order, recipe, self.all_of(centroids))[0], centroids
