"""python -m bench.switches: one model quantized with single settings of the recipe changed, and its perplexity on texts of several kinds."""
from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path

import torch

from gptvq.calibration import calibration_tokens, read_tokens, tokens_sha256
from gptvq.config import Recipe, VQConfig
from gptvq.demo import bundled_model
from gptvq.errors import ConfigError
from gptvq.evaluate import perplexity
from gptvq.hf import open_model
from gptvq.quantize import quantize

from . import runner
from .perplexity import LayerLog

EXAMPLES = """examples:
  python -m bench.switches --calibration wiki.txt --texts more-wiki.txt,code.txt --recipes shrink=0 --recipes shrink=0.1,ridge=0.3
  python -m bench.switches --table bench/results/switches.json

The texts are to choose by, and so neither the calibration's nor those that results are stated on.  The dense model is a row too; rows are
added to those that the file has."""


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.table:
        print(show([row for path in args.table for row in runner.load(path)["rows"]]))
        return
    recipes = {name: recipe_of(name) for name in args.recipes or [""]}
    for option, paths in (("--calibration", [args.calibration]), ("--texts", args.texts or [None])):
        for path in paths:
            if path is None or not Path(path).is_file():
                raise ConfigError(f"{option}: got {path}, need a text file")
    stems = [Path(path).stem for path in args.texts]
    if len(set(stems)) < len(stems):
        raise ConfigError(f"--texts: got {', '.join(stems)}, need files of different names, which head the columns")
    configs = {(preset, name): VQConfig.preset(preset, recipe=recipe) for preset in args.presets for name, recipe in recipes.items()}
    source = args.model or bundled_model()
    dense, tokenizer = open_model(source, device=args.device, dtype="bfloat16")
    calibration = calibration_tokens(args.calibration, tokenizer, args.samples, args.sequence_length, 0)
    texts = {Path(path).stem: read_tokens(path, tokenizer, "--texts") for path in args.texts}
    results = runner.Results("switches", argv, args.json, {
        "model": Path(source).name, "samples": args.samples, "sequence_length": args.sequence_length, "window": args.window,
        "windows": args.windows, "calibration_sha256": tokens_sha256(calibration),
        "texts": {name: tokens_sha256(ids) for name, ids in texts.items()}}, resume=True,
                             recipe=lambda row: recipe_of(row["recipe"]) if row["preset"] else None)
    there = {(row["preset"], row["recipe"]) for row in results.rows}
    for preset, name in [(None, "dense"), *configs]:
        if (preset, name) in there:
            continue
        began, row = time.perf_counter(), {}
        if preset is None:
            model = dense
        else:
            report = quantize(source, None, configs[preset, name], calibration=calibration, device=args.device, dtype="bfloat16", check=None,
                              progress=LayerLog())
            model, row = report.model, {"bits_per_value": report.bits_per_value, "solver_error": report.mean_error}
        seconds = time.perf_counter() - began
        results.add([{"preset": preset, "recipe": name, **row, "seconds": seconds, "threads": torch.get_num_threads(),
                      "perplexity": {text: perplexity(model, ids, args.window, args.windows) for text, ids in texts.items()}}])
        runner.log(show(results.rows[-1:]))
    print(show(results.rows))


def recipe_of(changes: str) -> Recipe:
    """"damp=0.1,passes=1" -> the default recipe with these settings; "paper": the published procedure; "": as it is."""
    if changes == "paper":
        return Recipe.paper()
    known, found = {field.name: field.type for field in dataclasses.fields(Recipe)}, {}
    for part in filter(None, changes.split(",")):
        name, equals, value = part.partition("=")
        if not equals or name not in known:
            raise ConfigError(f"--recipes: got {part!r}, need NAME=VALUE with one of {', '.join(known)}")
        try:
            found[name] = {"int": int, "float": float, "str": str}[known[name]](value)
        except ValueError:
            raise ConfigError(f"--recipes: got {part!r}, need a number") from None
    return Recipe(**found)


def parser():
    p = runner.parser("switches", "Perplexity on several texts with settings of the recipe changed.", EXAMPLES)
    p.add_argument("--model", metavar="PATH", help="model folder, hub id or .gguf file; default the demo's SmolLM2-135M")
    p.add_argument("--calibration", metavar="FILE", help="text the error is minimised on")
    p.add_argument("--texts", type=runner.names, metavar="A,B", help="files to predict")
    p.add_argument("--presets", type=runner.names, default=["2d-2.25-s64"], metavar="A,B", help="default 2d-2.25-s64")
    p.add_argument("--recipes", action="append", metavar="NAME=VALUE,..", help="a row with these settings changed, or `paper`; can be given "
                   "several times, an empty one is the recipe as it is; default that alone")
    p.add_argument("--samples", type=runner.positive, default=24, metavar="N", help="calibration sequences, default %(default)s")
    p.add_argument("--sequence-length", type=runner.positive, default=1024, metavar="N", help="tokens in each, default %(default)s")
    p.add_argument("--window", type=runner.positive, default=2048, metavar="N", help="tokens per window of a text, default %(default)s")
    p.add_argument("--windows", type=runner.positive, default=8, metavar="N", help="of each text, default %(default)s")
    p.add_argument("--device", default="cpu", metavar="NAME", help="default %(default)s")
    p.add_argument("--table", nargs="+", metavar="FILE", help="measure nothing, print these result files")
    return p


def show(rows: list[dict]) -> str:
    texts = dict.fromkeys(text for row in rows for text in row["perplexity"])
    return runner.table(rows, {
        "preset": lambda r: r["preset"] or "", "recipe": lambda r: r["recipe"].replace(",", ", ") or "as it is",
        **{text: lambda r, text=text: f"{r['perplexity'][text]:,.2f}" for text in texts}})


if __name__ == "__main__":
    sys.exit(runner.run(main))
