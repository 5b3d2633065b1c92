"""quantize_weight: GPTVQ on one layer. Read `solve` from top to bottom for the algorithm."""
from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import codebook, ops
from .codebook import Codebooks
from .config import DEFAULT_PRESET, Recipe, VQConfig
from .errors import ConfigError, NumericalError
from .hessian import Hessian, HessianFactor, pad, wide
from .problem import Problem, gs_of, in_units, solvable, solving_bytes, unit_of
from .ranks import Rows
from .refine import absolute, adam_codebook, coordinate_descent, svd_codebook, update_codebook
from .spec import QuantSpec
from .weight import VQWeight


@dataclass
class LayerRecord:
    """What happened to one linear: size, relative layer error after every stage, repairs, time."""

    name: str
    spec: QuantSpec
    error: float                    # tr((W-Q) H (W-Q)^T) / tr(W H W^T), W the weight it was solved for
    stages: dict[str, float] = field(default_factory=dict)
    repair: str = ""
    damp: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    sha256: str = ""
    dropped: int = 0                # tokens of batches that were not finite
    dead: int = 0                   # input columns that were always zero
    distilled: list[float] = field(default_factory=list)       # of Recipe(distill): its block's output error before and after; `error` is from before

    @property
    def rows(self) -> int:
        return self.spec.rows

    @property
    def cols(self) -> int:
        return self.spec.cols

    @property
    def nbytes(self) -> int:
        return self.spec.nbytes

    @property
    def bits_per_value(self) -> float:
        return self.spec.bits_per_value

    @property
    def snr_db(self) -> float:
        return -10 * math.log10(max(self.error, 1e-30))

    def to_dict(self) -> dict:
        return {**dataclasses.asdict(self), "rows": self.rows, "cols": self.cols, "nbytes": self.nbytes,
                "bits_per_value": self.bits_per_value, "snr_db": self.snr_db}


def quantize_weight(W: Tensor, H: Tensor | Hessian, config: VQConfig | QuantSpec | str = DEFAULT_PRESET) -> VQWeight:
    """W [rows, cols], H [cols, cols] or a Hessian -> VQWeight; `config` may be a VQConfig, a preset's name or a QuantSpec.

    Raises ConfigError for shapes and types that do not fit and NumericalError for non-finite values.
    """
    if W.ndim != 2:
        raise ConfigError(f"weight: got shape {tuple(W.shape)}, need [rows, cols]")
    if not isinstance(H, (Tensor, Hessian)):
        raise ConfigError(f"H: got {type(H).__name__}, need a matrix [{W.shape[1]}, {W.shape[1]}] or a Hessian; "
                          f"torch.eye({W.shape[1]}) counts all inputs alike")
    if isinstance(H, Tensor) and (H.ndim != 2 or H.shape[0] != H.shape[1]):
        raise ConfigError(f"Hessian: got shape {tuple(H.shape)}, need a square matrix")
    for name, given in (("weight", W), ("Hessian", H)):
        if isinstance(given, Tensor) and given.is_complex():
            raise ConfigError(f"{name}: got complex numbers ({given.dtype}), need real ones")
    W = wide(W) if W.element_size() == 1 else W         # torch does not compute with float8
    if isinstance(config, str):
        config = VQConfig.preset(config)
    spec = config if isinstance(config, QuantSpec) else config.spec(*W.shape)
    return solve(W, H, spec, config.recipe if isinstance(config, VQConfig) else Recipe())[0]


@torch.no_grad()
def solve(weight: Tensor, hessian: Hessian | Tensor, spec: QuantSpec, recipe: Recipe = Recipe(),
          name: str = "weight", shared: bool = False, scales: tuple[Tensor, Tensor] | None = None) -> tuple[VQWeight, LayerRecord]:
    """Quantizes one layer to `spec` -> the packed weight and its record.

    shared: every process of the group is here with the same layer, and each solves some of its rows.  scales: where `weight` is some rows
    of a layer with block scales, `scaling.scale_range` of all of it.
    """
    start = time.perf_counter()
    unit = 1.0 if scales else unit_of(weight, name)
    hessian = hessian if isinstance(hessian, Hessian) else Hessian.from_matrix(hessian)
    rows = Rows(spec, shared, scales)
    ops.require_memory(weight.device, solving_bytes(rows.spec.rows, spec), f"{name}: solving {rows.spec.rows} x {spec.cols} weights",
                       lambda free: solvable(spec, free))
    problem = _problem(weight, hessian, spec, recipe, name, rows, unit)
    order = _visiting_order(problem, recipe)
    columns = (order[:, None] * spec.dim + torch.arange(spec.dim, device=order.device)).flatten()
    factor = hessian.factor((recipe.order, spec.dim), columns, recipe.damp, problem.W.dtype, recipe.shrink)
    usable = factor.weighting(problem.H[: spec.cols, : spec.cols])
    if factor.changed:
        problem = Problem(problem.W[:, : spec.cols], pad(usable, len(problem.H)), rows.spec, rows, recipe.method)

    *_, best = stages(problem, factor, order, recipe)
    if not math.isfinite(best.error):
        raise NumericalError(f"{name}: the layer error is not finite; check the weights' range ({float(weight.abs().max()):.3g}) "
                             "and the calibration activations, or use dtype float64")
    tables = best.codebooks.tables if spec.svd_rank else {
        name: rows.join(table, groups=True) for name, table in best.codebooks.tables.items()}
    vq = VQWeight.from_parts(spec, rows.join(best.index), tables, rows.join(gs_of(best.codebooks.gs, unit), groups=True),
                             *((rows.join(problem.scale_codes), problem.sz) if spec.scale_block else ()))
    digest = hashlib.sha256()
    for buffer in vq.buffers.values():
        digest.update(buffer.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    repair = factor.repair
    if factor.unweighted and hessian.tokens and not bool(hessian.matrix().any()):
        repair = "inputs of zeros: unweighted"
    elif factor.changed and not factor.unweighted:
        repair += ", by which errors are measured too"
    return vq, LayerRecord(name, spec, best.error, best.stages, "; ".join(filter(None, [*hessian.repairs(), repair])), factor.damp,
                           hessian.tokens, time.perf_counter() - start, digest.hexdigest(), hessian.dropped, hessian.dead())


def stages(problem: Problem, factor: HessianFactor, order: Tensor, recipe: Recipe) -> Iterator[Best]:
    """The passes, then the sweeps, each from the best state so far, which is given after every one of them.

    The updates between the first stage and the last take half the iterations: what they leave is for the next.  Where few inputs outweigh
    all others, rounding to int8 costs more than an update brings: then new codes count with the codebooks that they were found with, in
    the end or where the next stage would find the same codes again.
    """
    best, last, aside = Best(problem), recipe.passes + recipe.sweeps, (math.inf,)
    for stage in range(1, last + 1):
        iterations, pull = recipe.cg_iterations if stage in (1, last) else (recipe.cg_iterations + 1) // 2, None
        before, error = best.codebooks, math.inf
        centroids = before.centroids if before else None
        if stage <= recipe.passes:
            index, centroids = column_pass(problem, factor, order, recipe, centroids)
            if before:
                error, pull = problem.measure(index, centroids, product=ops.matmul_split)
        else:
            index, pull = coordinate_descent(problem, best.index, centroids, recipe.block_cols, best.pull)
            error = problem.error(index, centroids, pull)
        if error < aside[0]:
            aside = error, index, before
        name = f"pass {stage}" if stage <= recipe.passes else f"sweep {stage - recipe.passes}"
        best.offer(name, *_refit(problem, index, centroids, recipe.method, iterations, pull))
        if aside[0] < best.error and (stage == last or best.codebooks is before):
            best.offer(name, *aside[1:])
        yield best


def _problem(weight: Tensor, hessian: Hessian, spec: QuantSpec, recipe: Recipe, name: str, rows: Rows, unit: float) -> Problem:
    if tuple(weight.shape) != (spec.rows, spec.cols):
        raise ConfigError(f"{name}: got a weight {tuple(weight.shape)}, the spec is for ({spec.rows}, {spec.cols})")
    if not bool(torch.isfinite(weight).all()):
        raise NumericalError(f"{name}: the weight holds {int((~torch.isfinite(weight)).sum())} non-finite values; "
                             "the source checkpoint is damaged or its dtype overflowed")
    try:
        H = hessian.matrix()
    except NumericalError as error:
        raise NumericalError(f"{name}: {error}") from None
    if len(H) != spec.cols:
        raise ConfigError(f"{name}: got a Hessian {tuple(H.shape)} for a weight with {spec.cols} columns")
    dtype = getattr(torch, recipe.dtype)
    share = in_units(weight.detach()[rows.first: rows.last], unit, dtype)
    return Problem(share, pad(H.to(weight.device, dtype), spec.vectors * spec.dim), rows.spec, rows, recipe.method)


def _visiting_order(problem: Problem, recipe: Recipe) -> Tensor:
    """Vectors in the order of quantization: descending summed diag H (the codes stay in natural order), or left to right."""
    if recipe.order == "sequential":
        return torch.arange(problem.spec.vectors, device=problem.W.device)
    return problem.H.diagonal().view(-1, problem.spec.dim).sum(1).argsort(descending=True, stable=True)


def column_pass(problem: Problem, factor: HessianFactor, order: Tensor, recipe: Recipe,
                centroids: Tensor | None) -> tuple[Tensor, Tensor]:
    """One full pass: every vector column in `order`, its error propagated to all later ones -> (index, centroids).

    Without `centroids` they are fitted: in importance order all of them at once on the weights as they are; in
    sequential order strip by strip on the weights as compensated so far, scales included.
    """
    spec, d = problem.spec, problem.spec.dim
    columns = (order[:, None] * d + torch.arange(d, device=order.device)).flatten()
    roots, metric = metrics(factor.U, d, recipe.method)
    by_strip = centroids is None and recipe.order == "sequential"
    if centroids is None:
        centroids = problem.W.new_zeros(spec.row_groups, spec.strips, spec.codewords, d)
        if not by_strip:
            problem.rescale(problem.W, 0, spec.cols)
            natural = torch.empty_like(metric)
            natural[order] = metric
            for strip in range(spec.strips):
                fit_strip(problem, centroids, strip, problem.W, natural, recipe)
    W = problem.W[:, columns]
    index = torch.empty(spec.rows, spec.vectors, dtype=getattr(torch, spec.code_dtype), device=W.device)
    # Two levels: errors come to the columns before `reach` at once, to all behind it together. A fit needs them everywhere.
    lazy = W.shape[1] if by_strip else max(ops.lazy_columns(W.device, W.shape[1]), recipe.block_cols)
    begun, reach, pending = 0, lazy, []
    for first, last in _blocks(spec, recipe):
        if by_strip and first * d % spec.group_cols == 0:
            strip = first * d // spec.group_cols
            end = min(first * d + spec.group_cols, W.shape[1])
            problem.rescale(W[:, first * d: end], first * d, end)
            fit_strip(problem, centroids, strip, W, metric, recipe)
        at, cols = order[first:last], slice(first * d, last * d)
        scale = None if problem.scale is None else problem.scale[:, at]
        index[:, at], E = ops.column_block(
            W[:, cols], factor.U[cols, cols], roots[first:last], centroids, problem.strip[at], scale, spec.group_rows,
            recipe.method == "paper", spec.signs > 0)
        pending += [E] if reach < W.shape[1] else []
        ops.submatmul(W[:, cols.stop: reach], E, factor.U[cols, cols.stop: reach])
        if cols.stop + recipe.block_cols > reach and reach < W.shape[1]:        # the next block might go beyond it
            ops.submatmul(W[:, reach:], torch.cat(pending, 1), factor.U[begun: cols.stop, reach:])
            begun, reach, pending = cols.stop, cols.stop + lazy, []
    return index, centroids


def metrics(U: Tensor, d: int, method: str) -> tuple[Tensor, Tensor]:
    """U [n, n] -> (roots U_PP^-1 for assignment and propagation, metric of the EM), both [n / d, d, d].

    Exactly: M_P = U_PP^-1 U_PP^-T. The published code drops the coupling within a vector and weighs the EM by U_jj.
    """
    blocks = U.view(len(U) // d, d, len(U) // d, d).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    if method == "paper":
        diagonal = blocks.diagonal(dim1=1, dim2=2)
        return torch.diag_embed(1 / diagonal), torch.diag_embed(diagonal)
    roots = torch.linalg.solve_triangular(blocks, torch.eye(d, dtype=U.dtype, device=U.device).expand_as(blocks), upper=True)
    return roots, roots @ roots.transpose(1, 2)


def fit_strip(problem: Problem, centroids: Tensor, strip: int, W: Tensor, metric: Tensor, recipe: Recipe) -> None:
    """Fits the codebooks of one strip, all row groups at once, on W [rows, n] in natural order; writes centroids[:, strip]."""
    spec, d = problem.spec, problem.spec.dim
    first = strip * spec.group_cols // d
    at = slice(first, min(first + spec.group_cols // d, spec.vectors))
    width = at.stop - at.start
    x = W.view(spec.rows, spec.vectors, d)[:, at]
    weight = x.new_ones(spec.rows, width)
    if problem.scale is not None:
        x, weight = x / problem.scale[:, at, None], problem.scale[:, at]
    metric = metric[at]
    if spec.signs:              # of absolute values, whose coupling within a vector would change its sign from one to the next
        x, metric = x.abs(), torch.diag_embed(metric.diagonal(dim1=1, dim2=2))
    missing = spec.row_groups * spec.group_rows - spec.rows          # a last shorter group is filled with points of weight 0
    x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, missing)).reshape(spec.row_groups, -1, d)
    weight = torch.nn.functional.pad(weight, (0, 0, 0, missing)).reshape(spec.row_groups, -1)
    peak = weight.amax(1, keepdim=True)
    weight = (weight / (peak / peak.frexp().mantissa)).square()      # by a power of two: squares of scales of 1e-23 would be 0, and so padding
    centroids[:, strip] = codebook.fit(x, metric, weight, spec.codewords, recipe.em_iterations, recipe.em_starts,
                                       problem.rows)


def _blocks(spec: QuantSpec, recipe: Recipe) -> list[tuple[int, int]]:
    """Lazy-update blocks as ranges of visited vectors; in sequential order none crosses a strip, whose fit needs all before it."""
    size = recipe.block_cols // spec.dim
    reach = spec.group_cols // spec.dim if recipe.order == "sequential" else spec.vectors
    return [(a, min(a + size, start + reach, spec.vectors))
            for start in range(0, spec.vectors, reach) for a in range(start, min(start + reach, spec.vectors), size)]


def _refit(problem: Problem, index: Tensor, centroids: Tensor, method: str, iterations: int,
           pull: Tensor | None) -> tuple[Tensor, Codebooks]:
    """The codebook update for these codes, then the stored form -> (index, codebooks); an SVD form renumbers the index."""
    if method == "paper":
        centroids = adam_codebook(problem, index, centroids)
    else:
        centroids = update_codebook(problem, index, centroids, iterations, pull)
    if problem.spec.svd_rank:
        return svd_codebook(problem, index, centroids)
    if problem.spec.signs:
        index, centroids = absolute(problem, index, centroids)
    return index, codebook.compress(centroids, problem.spec.least_entry)


class Best:
    """The best state seen, its (W - Q) H, and the error after every stage."""

    def __init__(self, problem: Problem):
        self.problem, self.error, self.stages = problem, math.inf, {}
        self.index: Tensor | None = None
        self.codebooks: Codebooks | None = None
        self.pull: Tensor | None = None

    def offer(self, stage: str, index: Tensor, codebooks: Codebooks) -> None:
        error, pull = self.problem.measure(index, codebooks.centroids)
        self.stages[stage] = min(error, self.stages.get(stage, math.inf))
        if self.index is None or error < self.error:
            self.index, self.codebooks, self.error, self.pull = index, codebooks, error, pull
