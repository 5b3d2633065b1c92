"""python -m bench.presets: which preset to choose; of one model and each preset the size, the perplexity and the decoding speed."""
from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers.utils import logging

from gptvq.calibration import read_tokens, tokens_sha256
from gptvq.cli import encode
from gptvq.config import PRESETS, VQConfig
from gptvq.demo import bundled_model, checkpoint_bytes
from gptvq.errors import ConfigError
from gptvq.evaluate import decode, perplexity
from gptvq.hf import load, open_model
from gptvq.quantize import quantize
from gptvq.report import clock

from . import runner
from .decode import PROMPT
from .perplexity import LayerLog, size

DEFAULT = ("2d-2.125", "2d-2.25", "2d-2.25-s64", "4d-2.25", "2d-3.125", "2d-3.125-s64", "1d-4.125-s64", "2d-4.125")
Decode = Callable[[list[int], int], tuple[list[int], float]]     # (prompt, new tokens) -> (their ids, tokens per second)
EXAMPLE = """examples:
  python -m bench.presets --calibration wiki.train.txt --text wiki.test.txt --json bench/results/presets.json
  python -m bench.presets --presets 2d-3.125-s64,2d-3.125-s64+2d-4.125-s64 --calibration wiki.train.txt --text wiki.test.txt
  python -m bench.presets --table bench/results/presets.json

A preset behind a + is that of the output head, which is left dense without one.
Tokens per second: greedy, batch 1, the packed and the dense bfloat16 model taking turns; "x dense" is the median of the ratios within
the rounds, which other load of the machine touches less than the speeds.  whole model: all tensors of the checkpoint.
quantize: time of the processor, summed over the cores.  Rows are added to those that the file has; a preset that is there is not
measured again."""


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    print(show([row for path in args.table for row in runner.load(path)["rows"]] if args.table else measure(args, argv)))


def parser():
    p = runner.parser("presets", "Size, perplexity and decoding speed of one model at several presets.", EXAMPLE)
    p.add_argument("--model", metavar="PATH", help="model folder, hub id or .gguf file; default the demo's SmolLM2-135M")
    p.add_argument("--calibration", metavar="FILE", help="text the error is minimised on")
    p.add_argument("--text", metavar="FILE", help="text to predict, not used for calibration")
    p.add_argument("--presets", type=runner.names, default=list(DEFAULT), metavar="A,B", help=f"default {','.join(DEFAULT)}")
    p.add_argument("--samples", type=runner.positive, default=32, metavar="N", help="calibration sequences, default %(default)s")
    p.add_argument("--sequence-length", type=runner.positive, default=1024, metavar="N", help="tokens in each, default %(default)s")
    p.add_argument("--window", type=runner.positive, default=2048, metavar="N", help="tokens per window of the text, default %(default)s")
    p.add_argument("--max-windows", type=runner.positive, default=40, metavar="N", help="default %(default)s")
    p.add_argument("--tokens", type=runner.positive, default=32, metavar="N", help="new tokens in each round, default %(default)s")
    p.add_argument("--repeats", type=runner.positive, default=11, metavar="N", help="rounds, default %(default)s")
    p.add_argument("--fresh", action="store_true", help="measure the rows that the file has already anew")
    p.add_argument("--table", nargs="+", metavar="FILE", help="measure nothing, print these result files")
    return p


def measure(args, argv: list[str] | None) -> list[dict]:
    """A row of the dense model, and one of each preset."""
    runner.check_names("--presets", [part for preset in args.presets for part in preset.split("+", 1)], PRESETS)
    for option in ("calibration", "text"):
        if getattr(args, option) is None or not Path(getattr(args, option)).is_file():
            raise ConfigError(f"--{option}: got {getattr(args, option)}, need a text file")
    source = args.model or bundled_model()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dense, tokenizer = open_model(source, device="cpu", dtype="bfloat16")
    tokens, prompt = read_tokens(args.text, tokenizer, "--text"), encode(tokenizer, PROMPT, chat=False)[0]
    results = runner.Results("presets", argv, args.json, {
        "model": Path(source).name, "dtype": "bfloat16", "samples": args.samples, "sequence_length": args.sequence_length,
        "text_sha256": tokens_sha256(tokens), "window": args.window, "windows": min(len(tokens) // args.window, args.max_windows),
        "tokens": args.tokens, "repeats": args.repeats, "threads": torch.get_num_threads()}, resume=not args.fresh)
    there = {row["preset"] for row in results.rows}
    if None not in there:
        results.add([{"preset": None, **size(dense, tokens), "total_bytes": sum(p.numel() * p.element_size() for p in dense.parameters()),
                      "perplexity": perplexity(dense, tokens, args.window, args.max_windows)}])
    for preset in (preset for preset in args.presets if preset not in there):
        with tempfile.TemporaryDirectory() as folder:
            used, (body, _, head) = time.process_time(), preset.partition("+")
            report = quantize(source, folder, VQConfig.preset(body, head=head), calibration=args.calibration, samples=args.samples,
                              sequence_length=args.sequence_length, device="cpu", dtype="bfloat16", resume="never", check=None,
                              progress=LayerLog())
            used = time.process_time() - used
            packed, total = load(folder, "cpu"), checkpoint_bytes(Path(folder))
        row = {"preset": preset, "format": format_of(body), "mean_error": report.mean_error,
               "bits_per_value": report.bits_per_value, "linear_bytes": report.packed_bytes, "total_bytes": total,
               "quantize_seconds": report.seconds, "quantize_cpu_seconds": used,
               "perplexity": perplexity(packed, tokens, args.window, args.max_windows)}
        results.add([row | speed(partial(decode, packed), partial(decode, dense), prompt, args.tokens, args.repeats)])
        runner.log(f"{preset}: perplexity {row['perplexity']:.3f}, {clock(report.seconds)} to quantize")
    return results.rows


def speed(packed: Decode, dense: Decode, prompt: list[int], tokens: int, repeats: int) -> dict:
    """Tokens per second of both ways to decode, and how busy the machine was with other things besides."""
    ways = {"packed": packed, "dense": dense}
    for way in ways.values():
        way(prompt, 2)                                  # the first run also allocates
    began, used = time.perf_counter(), time.process_time()
    load_before = os.getloadavg()[0]
    found = runner.turns({name: lambda way=way: way(prompt, tokens)[1] for name, way in ways.items()}, repeats)
    return {"tokens_per_second": statistics.median(found["packed"]), "dense_tokens_per_second": statistics.median(found["dense"]),
            "speedup": statistics.median(p / d for p, d in zip(found["packed"], found["dense"])), "load_average": load_before,
            "cores_used": (time.process_time() - used) / (time.perf_counter() - began)}


def format_of(preset: str) -> str:
    return VQConfig.preset(preset).spec(4096, 4096).form


def show(rows: list[dict]) -> str:
    dense = next((row["perplexity"] for row in rows if row["preset"] is None), None)
    return runner.table(sorted(rows, key=lambda row: -row["bits_per_value"]), {
        "preset": lambda r: (r["preset"] or "dense").replace("+", ", head "), "format": lambda r: format_of(r["preset"].partition("+")[0]) if r["preset"] else r["format"],
        "bits per weight": lambda r: f"{r['bits_per_value']:.3f}",
        "linears, MB": lambda r: f"{r['linear_bytes'] / 1e6:.1f}", "whole model, MB": lambda r: f"{r['total_bytes'] / 1e6:.1f}",
        "perplexity": lambda r: f"{r['perplexity']:,.2f}", "x dense perplexity": lambda r: f"{r['perplexity'] / dense:.2f}",
        "tokens/s": lambda r: f"{r['tokens_per_second']:.0f}", "x dense tokens/s": lambda r: f"{r['speedup']:.2f}",
        "quantize, processor": lambda r: clock(r["quantize_cpu_seconds"])})


if __name__ == "__main__":
    sys.exit(runner.run(main))
