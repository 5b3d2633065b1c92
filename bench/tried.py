"""python -m bench.tried: what could be done to the scales and groups of a format, on real layers: what was taken, and what was not."""
from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from gptvq.config import PRESETS, Recipe, VQConfig
from gptvq.demo import bundled_model
from gptvq.errors import ConfigError
from gptvq.hf import open_model
from gptvq.spec import QuantSpec

from . import layers, runner
from .rotation import rotate, turned
from .variants import Norm, RowScales, Search, Signed, Variant, Wide, one_codebook, tall

EXAMPLES = """examples:
  python -m bench.tried --calibration wiki.train.txt --heldout wiki.test.txt --json bench/results/tried.json
  python -m bench.tried --table bench/results/tried.json

Relative layer errors as in bench.quality --layers, all by the whole recipe, and their ratio to the recipe as it is.
norm P: block scales follow the P-th mean of the weights, norm 0 the largest.  search: behind every stage each block takes that of its 16
scales that has the least loss, and the two numbers from which the 16 come are fitted to what the blocks would like.  row scales P: each row is
divided by its root mean square to the power P, which is stored in 16 bits.  4D K4096: one codebook of that size for a layer, with the
same block scales; of +-2048: half of it is the other half with its signs changed, and is not stored; of 256 and signs: the signed
format with one codebook.  tall: groups of the same size over all rows.  rotated: the same layers of a model that random Hadamard matrices
rotate (bench/rotation.py), residual stream and heads' values; with down_proj, down_proj alone: its inputs too, or only these, in
blocks, which costs a step of its own at inference."""
DEFAULT = ["2d-2.25", "2d-3.125", "2d-2.25-s64", "4d-2.125-s64", "2d-3.125-s64"]


#: name -> variant of a format, None where it does not apply
VARIANTS: dict[str, Callable[[QuantSpec], Variant | None]] = {
    "as it is": Variant,
    **{f"norm {p}": lambda spec, p=p: Norm(spec, p) if spec.scale_block else None for p in (0, 4)},
    "search": lambda spec: Search(spec) if spec.scale_block else None,
    **{f"row scales {p}": lambda spec, p=p: None if spec.scale_block else RowScales(spec, p) for p in (0.5, 1.0)},
    **{f"4D K4096{name}": lambda spec, make=make: make(spec) if spec.scale_block and (spec.dim, spec.index_bits) == (2, 3) else None
       for name, make in (("", Wide), (" of +-2048", Signed), (" of 256 and signs", one_codebook))},
    "tall": lambda spec: None if spec.scale_block else tall(spec),
}
#: The recipe as it is, on layers that are rotated.
ROTATED = ("rotated", "rotated with down_proj", "down_proj alone")


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.table:
        print(show([row for path in args.table for row in runner.load(path)["rows"]]))
        return
    runner.check_names("--presets", args.presets, PRESETS)
    runner.check_names("--variants", args.variants, [*VARIANTS, *ROTATED])
    for option in layers.SIDES:
        if getattr(args, option) is None or not Path(getattr(args, option)).is_file():
            raise ConfigError(f"--{option}: got {getattr(args, option)}, need a text file")
    source = args.model or bundled_model()
    model, tokenizer = open_model(source, device="cpu", dtype="bfloat16")
    tokens, texts = layers.read(args, tokenizer)
    found = layers.collect(model, tokens, args.blocks, args.linears, torch.device("cpu"))
    makers = {name: (VARIANTS[name], found) for name in ("as it is", *args.variants) if name in VARIANTS}
    if "down_proj alone" in args.variants:
        makers["down_proj alone"] = Variant, turned(found, args.seed)
    if {"rotated", "rotated with down_proj"} & set(args.variants):
        rotated = layers.collect(rotate(model, seed=args.seed), tokens, args.blocks, args.linears, torch.device("cpu"))
        both = {"rotated": rotated, "rotated with down_proj": turned(rotated, args.seed)}
        makers |= {name: (Variant, both[name]) for name in both if name in args.variants}
    del model
    results = runner.Results("tried", argv, args.json, {"model": Path(source).name, "samples": args.samples, "sequence_length": args.sequence_length,
                                                        "seed": args.seed, **texts, "layers": [layer.name for layer in found]})
    for row in measure(args.presets, makers):
        results.add([row])
    print(show(results.rows))


@torch.no_grad()
def measure(presets: list[str], makers: dict[str, tuple[Callable[[QuantSpec], Variant | None], list[layers.Layer]]]) -> Iterator[dict]:
    """A row of each preset and variant: mean errors over its layers, and the means of their ratios to the first of `makers`."""
    for preset in presets:
        base: list[dict[str, float]] = []
        for name, (make, found) in makers.items():
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
    p.add_argument("--variants", type=runner.names, default=[*VARIANTS, *ROTATED], metavar="A,B", help="beside the recipe as it is, default all")
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
