"""python -m bench.tried: what could be done to the scales and groups of a format, on real layers: what was taken, and what was not."""
from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from gptvq import ops, problem, solver
from gptvq import spec as spec_module
from gptvq.backends import reference
from gptvq.config import PRESETS, Recipe, VQConfig
from gptvq.demo import bundled_model
from gptvq.errors import ConfigError
from gptvq.hessian import Hessian
from gptvq.hf import open_model
from gptvq.problem import Problem
from gptvq.scaling import scale_table
from gptvq.spec import QuantSpec

from . import layers, runner

EXAMPLES = """examples:
  python -m bench.tried --calibration wiki.train.txt --heldout wiki.test.txt --json bench/results/tried.json
  python -m bench.tried --table bench/results/tried.json

Relative layer errors as in bench.quality --layers, all by the whole recipe, and their ratio to the recipe as it is.
norm P: block scales follow the P-th mean of the weights, norm 0 the largest.  search: behind every stage each block takes that of its 16
scales that has the least loss, and the two numbers from which the 16 come are fitted to what the blocks would like.  row scales P: each row is
divided by its root mean square to the power P, which is stored in 16 bits.  4D K4096: one codebook of that size for a layer, with the
same block scales.  tall: groups of the same size over all rows."""
DEFAULT = ["2d-2.25", "2d-3.125", "2d-2.25-s64", "4d-2.125-s64", "2d-3.125-s64"]


class Variant:
    """The recipe on one format; the subclasses change one thing each."""

    def __init__(self, spec: QuantSpec):
        self.spec, self.bits = spec, spec.bits_per_value

    def problem(self, W: Tensor, H: Tensor) -> Problem:
        return Problem(W, H, self.spec)

    def between(self, best: solver._Best) -> None:
        """Behind every stage."""

    column_pass = staticmethod(solver.column_pass)

    def error(self, layer: layers.Layer, recipe: Recipe) -> dict[str, float]:
        """{side: error}."""
        hessian, spec = Hessian.from_matrix(layer.hessians["calibration"].matrix()), self.spec
        made = self.problem(layer.weight, hessian.matrix())
        order = solver._visiting_order(made, recipe)
        columns = (order[:, None] * spec.dim + torch.arange(spec.dim)).flatten()
        factor = hessian.factor((recipe.order, spec.dim), columns, recipe.damp, made.W.dtype)
        index, centroids = self.column_pass(made, factor, order, recipe, None)
        best = solver._Best(made, spec)
        best.offer("pass 1", *solver._refit(made, index, centroids, recipe))
        for i in range(2, recipe.passes + 1):
            self.between(best)
            index, _ = self.column_pass(made, factor, order, recipe, best.codebooks.centroids)
            best.offer(f"pass {i}", *solver._refit(made, index, best.codebooks.centroids, recipe))
        for i in range(1, recipe.sweeps + 1):
            self.between(best)
            index = solver.coordinate_descent(made, best.index, best.codebooks.centroids, recipe.block_cols)
            best.offer(f"sweep {i}", *solver._refit(made, index, best.codebooks.centroids, recipe))
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
        R = ops.matmul(made.W - made.decode(best.index, best.codebooks.centroids), made.H)
        for b in range(spec.scale_blocks):
            at = slice(b * spec.scale_block, min((b + 1) * spec.scale_block, len(made.H)))
            C, now = ones[:, at], made.scale[:, at.start // spec.dim]
            curve = ((C @ made.H[at, at]) * C).sum(1).double()              # the loss of a scale s: curve (s - wish)^2 + constant
            wish = torch.where(curve > 0, now + (C * R[:, at]).sum(1) / curve.clamp_min(1e-30), now.double())
            sz, codes = _nearest_grid(made.sz[b], made.scale_codes[:, b], wish, curve)
            scale = scale_table(sz[None])[0][codes.long()]
            R -= ((scale - now)[:, None] * C) @ made.H[at]
            made.sz[b], made.scale_codes[:, b], made.scale[:, at.start // spec.dim: at.stop // spec.dim] = sz, codes, scale[:, None]
        best.error = made.error(best.index, best.codebooks.centroids)


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


class Wide(Variant):
    """Four dimensions, 4096 centroids for all of the layer, as many scales: indices of 12 bits, which no kernel of ours decodes."""

    formats = mock.patch.dict(spec_module.FORMATS, {(4, 3): 12})
    without_kernels = mock.patch.multiple(ops, decode=reference.decode, collect=reference.collect, descent_block=reference.descent_block)

    def __init__(self, spec: QuantSpec):
        with self.formats:
            super().__init__(QuantSpec(spec.rows, spec.cols, 4, 3, spec.rows, spec.cols, spec.scale_block))

    def error(self, layer, recipe):
        with self.formats, self.without_kernels:
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


#: name -> variant of a format, None where it does not apply
VARIANTS: dict[str, Callable[[QuantSpec], Variant | None]] = {
    "as it is": Variant,
    **{f"norm {p}": lambda spec, p=p: Norm(spec, p) if spec.scale_block else None for p in (0, 4)},
    "search": lambda spec: Search(spec) if spec.scale_block else None,
    **{f"row scales {p}": lambda spec, p=p: None if spec.scale_block else RowScales(spec, p) for p in (0.5, 1.0)},
    "4D K4096": lambda spec: Wide(spec) if spec.scale_block and (spec.dim, spec.index_bits) == (2, 3) else None,
    "tall": lambda spec: None if spec.scale_block else tall(spec),
}


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.table:
        print(show([row for path in args.table for row in runner.load(path)["rows"]]))
        return
    runner.check_names("--presets", args.presets, PRESETS)
    for option in layers.SIDES:
        if getattr(args, option) is None or not Path(getattr(args, option)).is_file():
            raise ConfigError(f"--{option}: got {getattr(args, option)}, need a text file")
    source = args.model or bundled_model()
    model, tokenizer = open_model(source, device="cpu", dtype="bfloat16")
    tokens, texts = layers.read(args, tokenizer)
    found = layers.collect(model, tokens, args.blocks, args.linears, torch.device("cpu"))
    del model
    results = runner.Results("tried", argv, args.json, {"model": Path(source).name, "samples": args.samples, "sequence_length": args.sequence_length,
                                                        "seed": args.seed, **texts, "layers": [layer.name for layer in found]})
    for row in measure(found, args.presets):
        results.add([row])
    print(show(results.rows))


@torch.no_grad()
def measure(found: list[layers.Layer], presets: list[str]) -> Iterator[dict]:
    """A row of each preset and variant: mean errors over the layers, and the means of their ratios to the recipe as it is."""
    for preset in presets:
        base: list[dict[str, float]] = []
        for name, make in VARIANTS.items():
            made = [make(VQConfig.preset(preset).spec(*layer.weight.shape, layer.name)) for layer in found]
            if None in made:
                continue
            began = time.perf_counter()
            errors = [variant.error(layer, Recipe()) for variant, layer in zip(made, found)]
            seconds, base = time.perf_counter() - began, base or errors
            row = {"preset": preset, "variant": name, "seconds": seconds,
                   "bits_per_value": sum(v.bits * v.spec.rows * v.spec.cols for v in made) / sum(v.spec.rows * v.spec.cols for v in made)}
            for side in layers.SIDES:
                row[f"error_{side}"] = sum(error[side] for error in errors) / len(errors)
                row[f"ratio_{side}"] = sum(error[side] / before[side] for error, before in zip(errors, base)) / len(errors)
            runner.log(f"{preset} {name}: {100 * row['error_calibration']:.3f} %, x {row['ratio_calibration']:.4f}, {seconds:.0f} s")
            yield row


def parser():
    p = runner.parser("tried", "Scales and groups of a format done otherwise, on real layers.", EXAMPLES)
    p.add_argument("--model", metavar="PATH", help="model folder, hub id or .gguf file; default the demo's SmolLM2-135M")
    p.add_argument("--calibration", metavar="FILE", help="text the error is minimised on")
    p.add_argument("--heldout", metavar="FILE", help="other text, for the second error")
    p.add_argument("--presets", type=runner.names, default=DEFAULT, metavar="A,B", help=f"default {','.join(DEFAULT)}")
    p.add_argument("--blocks", type=lambda text: [int(b) for b in runner.names(text)], default=[2, 15], metavar="I,J",
                   help="decoder blocks, counted from 0, default 2,15")
    p.add_argument("--linears", type=runner.names, default=["q_proj", "o_proj", "gate_proj", "down_proj"], metavar="A,B",
                   help="last names of linears, default q_proj,o_proj,gate_proj,down_proj")
    p.add_argument("--samples", type=runner.positive, default=16, metavar="N", help="sequences of each text, default %(default)s")
    p.add_argument("--sequence-length", type=runner.positive, default=1024, metavar="N", help="tokens in each, default %(default)s")
    p.add_argument("--seed", type=int, default=0, help="picks the sequences, default %(default)s")
    p.add_argument("--table", nargs="+", metavar="FILE", help="measure nothing, print these result files")
    return p


def show(rows: list[dict]) -> str:
    return runner.table(rows, {
        "preset": lambda r: r["preset"], "variant": lambda r: r["variant"], "bits per value": lambda r: f"{r['bits_per_value']:.3f}",
        "error": lambda r: f"{100 * r['error_calibration']:.3f} %", "held out": lambda r: f"{100 * r['error_heldout']:.3f} %",
        "change": lambda r: f"{100 * (r['ratio_calibration'] - 1):+.1f} %", "change, held out": lambda r: f"{100 * (r['ratio_heldout'] - 1):+.1f} %"})


if __name__ == "__main__":
    sys.exit(runner.run(main))
