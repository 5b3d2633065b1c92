"""python -m bench.gemv: products with a packed weight, VQLinear against torch, ggml, own INT4 and a plain read."""
from __future__ import annotations

import os
import statistics
import sys
from pathlib import Path

import torch

from gptvq.backends import native
from gptvq.config import PRESETS
from gptvq.errors import BackendUnavailable, ConfigError
from gptvq.large_pages import why_not

from . import device as on
from . import gemv_gpu, runner
from .contenders import ACTIVATIONS, BASELINES, KERNEL, READ, RING_BYTES, SETTLE, Shape, label, with_ggml

SHAPES = [(4096, 4096), (11008, 4096), (576, 1536), (1536, 576), (576, 576)]
WITH_SCALES = ["2d-2.25-s64", "4d-2.125-s64", "2d-3.125-s64", "4d-3.125-s64", "1d-4.125-s64"]
WITHOUT = ["1d-2.125", "1d-3.125", "1d-4.125", "2d-2.25", "2d-3.125", "2d-4.125", "4d-2.25", "4d-3.125"]
CACHES = ("cold", "hot")
EXAMPLE = """examples:
  python -m bench.gemv --json bench/results/gemv-cpu.json
  python -m bench.gemv --shapes 4096x4096 --m 2,4,8,16,32,64,128 --cache cold --json bench/results/gemv-cpu-m.json
  python -m bench.gemv --table bench/results/gemv-cpu.json --plot gemv.png

  python -m bench.gemv --device cuda --dtype float16 --m 1,8,2048 --json gemv-gpu.json

Cold: passes over a ring of copies of 192 MB; a last cache that is larger is not cold.  Hot: one weight again and again.
VQLinear and torch are called from Python, one call per product; ggml, INT4 and the read loop by themselves, without that cost, as is our
compiled function with --alone (gptvq kernel), but for a call from Python with addresses.
x ...: how many times faster than that baseline, median of paired ratios.  of read: the time that reading the packed bytes takes,
as a part of the time of the product. All weights lie in large pages of memory, as those of loaded packed models do (GPTVQ_LARGE_PAGES=0: in
small ones). Leave OMP_WAIT_POLICY unset where nothing else runs. GPTVQ_CPU=avx2: with the kernels for AVX2.
On a GPU: one pass over 200 MB of copies as a CUDA graph, replayed; against cuBLAS, other packages where they can be imported, and a
copy of 200 MB in the same run (of copy: the bytes of the weight per second, as a part of the bytes that the copy moves)."""


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.table:
        rows = [row for path in args.table for row in runner.load(path)["rows"]
                if tuple(row["shape"]) in (args.shapes or [tuple(row["shape"])]) and row["preset"] in (args.presets or [row["preset"]]) + [None]]
    else:
        check(args)
        rows = gemv_gpu.measure(args, argv) if args.device == "cuda" else measure(args, argv)
    if args.plot:
        plot(rows, args.plot)
    print((brief if args.brief else show)(rows))


def parser():
    p = runner.parser("gemv", "Speed of one linear for 1 to 128 tokens.", EXAMPLE)
    p.add_argument("--shapes", type=runner.shapes, metavar="RxC,RxC", help="default the SmolLM2 and Llama-7B shapes; of a --table, all")
    p.add_argument("--presets", type=runner.names, metavar="A,B",
                   help=f"default {','.join(WITH_SCALES + WITHOUT)}")
    p.add_argument("--activations", type=runner.names, default=list(ACTIVATIONS), metavar="A,B",
                   help=f"of {','.join(ACTIVATIONS)}; default all")
    p.add_argument("--baselines", type=runner.names, default=list(BASELINES), metavar="A,B",
                   help=f"of {','.join(BASELINES)}; default all")
    p.add_argument("--m", type=runner.numbers, default=[1], metavar="N,M", help="tokens at once, default 1; int4 and read have 1 only")
    p.add_argument("--threads", type=runner.numbers, default=[1, 2], metavar="N,M", help="default 1,2")
    p.add_argument("--alone", action="store_true", help="on a CPU: also our kernels by themselves, not through VQLinear")
    p.add_argument("--cache", type=runner.names, default=list(CACHES), metavar="A,B", help="of cold,hot; default both")
    p.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"),
                   help="of VQLinear's input, default %(default)s")
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default %(default)s")
    p.add_argument("--repeats", type=runner.positive, default=11, metavar="N", help="samples of each, in turns, default %(default)s")
    p.add_argument("--table", nargs="+", metavar="FILE", help="measure nothing, print these result files")
    p.add_argument("--brief", action="store_true", help="print a row per format, shape and number of tokens: cold caches")
    p.add_argument("--plot", metavar="FILE.png", help="also draw a chart (needs matplotlib: the extra `bench`)")
    return p


def check(args) -> None:
    """ConfigError on a name that is none, or a device that is not there; fills in the defaults."""
    args.shapes = args.shapes or (gemv_gpu.SHAPES if args.device == "cuda" else SHAPES)
    args.presets = args.presets or WITH_SCALES + WITHOUT
    runner.check_names("--presets", args.presets, PRESETS)
    runner.check_names("--activations", args.activations, ACTIVATIONS)
    runner.check_names("--baselines", args.baselines, BASELINES)
    runner.check_names("--cache", args.cache, CACHES)
    if args.alone and args.device == "cuda":
        raise ConfigError("--alone: of kernels on the CPU; on a GPU only they are timed")
    on.require(torch.device(args.device))


def measure(args, argv: list[str] | None) -> list[dict]:
    device, before = torch.device("cpu"), torch.get_num_threads()
    if not native.serves(device):
        raise BackendUnavailable(f"there are no kernels to measure: {native.why_not(device)}")
    args.baselines, libraries = with_ggml(args.baselines)
    results = runner.Results("gemv", argv, args.json, {"repeats": args.repeats, "dtype": args.dtype, "ring_bytes": RING_BYTES,
                                                       "pages": why_not() or "large", "ggml": libraries,
                                                       "kernels": os.environ.get("GPTVQ_CPU") or native.instruction_sets()[0]})
    least = RING_BYTES if "cold" in args.cache else 1
    try:
        for rows, cols in args.shapes:
            shape = Shape(rows, cols, device, getattr(torch, args.dtype), lambda nbytes: -(-least // nbytes))
            for m, threads, cache in ((m, t, c) for m in args.m for t in args.threads for c in args.cache):
                torch.set_num_threads(threads)
                results.add(compare(shape, args, m, threads, cache))
                runner.log(f"{rows}x{cols}, M {m}, {threads} threads, {cache}: {len(results.rows)} rows")
            shape.close()
    finally:
        torch.set_num_threads(before)
    return results.rows


@torch.inference_mode()
def compare(shape: Shape, args, m: int, threads: int, cache: str) -> list[dict]:
    """The rows of all contenders under one condition, timed in turns."""
    found = shape.contenders(args.presets, args.activations, args.baselines, m, threads, cache == "cold", args.alone)
    times = runner.paired({one.name: one.run for one in found}, args.repeats, settle=SETTLE)
    times = {one.name: [seconds / one.calls for seconds in times[one.name]] for one in found}
    baselines = [one.name for one in found if one.row["method"] not in ("gptvq", KERNEL, READ)]
    rows = []
    for one in found:
        median = statistics.median(times[one.name])
        of_read = {"of_read": runner.ratio(times, one.name, one.read)} if one.read in times else {}
        rows.append({"operation": "gemv" if m == 1 else "gemm", **one.row, "shape": [shape.rows, shape.cols], "m": m,
                     "device": "cpu", "threads": threads, "cache": cache, "median_seconds": median,
                     "gb_per_second": one.nbytes / median / 1e9, "gw_per_second": shape.rows * shape.cols * m / median / 1e9,
                     "speedup": {name: runner.ratio(times, one.name, name) for name in baselines if name != one.name}, **of_read})
        one.close()
    return rows


def show(rows: list[dict]) -> str:
    columns = {
        "operation": lambda r: r["operation"], "format": label, "bits per weight": lambda r: f"{r['bits_per_value']:.3f}",
        "shape": lambda r: f"{r['shape'][0]}x{r['shape'][1]}", "M": lambda r: r["m"], "threads": lambda r: r["threads"],
        "cache": lambda r: r["cache"], "median, us": lambda r: f"{r['median_seconds'] * 1e6:,.1f}",
        "GB/s": lambda r: f"{r['gb_per_second']:.1f}", "Gw/s": lambda r: f"{r['gw_per_second']:.1f}"}
    columns.update(runner.speedups(rows))
    for name in ("read", "copy"):
        if any(f"of_{name}" in row for row in rows):
            columns[f"of {name}"] = lambda r, name=name: f"{100 * r[f'of_{name}']:.0f} %"
    return runner.table(rows, columns)


def brief(rows: list[dict]) -> str:
    """Cold caches: a row per contender, shape and number of tokens, its columns the numbers of threads."""
    found: dict[tuple, dict[int, dict]] = {}
    for row in rows:
        if row["cache"] == "cold":
            found.setdefault((label(row), row["m"], *row["shape"]), {})[row["threads"]] = row
    threads = sorted({n for row in found.values() for n in row})
    columns = {"format": lambda r: label(next(iter(r.values()))), "bits per weight": lambda r: f"{next(iter(r.values()))['bits_per_value']:.2f}",
               "shape": lambda r: "x".join(map(str, next(iter(r.values()))["shape"]))}
    if len({row["m"] for row in rows}) > 1:
        columns["tokens"] = lambda r: next(iter(r.values()))["m"]
    columns |= {f"us, {n} thr.": lambda r, n=n: f"{r[n]['median_seconds'] * 1e6:,.0f}" for n in threads}
    for name in (name for name in ("ggml Q4_0", "int4 a8", "torch bf16") if any(name in row["speedup"] for row in rows)):
        columns[f"x {name}"] = lambda r, name=name: " / ".join(f"{r[n]['speedup'][name]:.2f}" for n in threads)
    if any("of_read" in row for row in rows):
        columns["of read"] = lambda r: " / ".join(f"{100 * r[n]['of_read']:.0f} %" for n in threads)
    return runner.table(list(found.values()), columns)


def plot(rows: list[dict], path: str) -> None:
    """One panel per shape: weights per second of every contender, at the first M, the first cache state and the most threads."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BackendUnavailable("--plot needs matplotlib: pip install matplotlib") from error
    if not rows:
        raise ConfigError("--plot: the result files hold no rows")
    first, threads = rows[0], max(row["threads"] for row in rows)
    rows = [r for r in rows if r["method"] != READ and (r["m"], r["cache"], r["threads"]) == (first["m"], first["cache"], threads)]
    shapes = list(dict.fromkeys(tuple(row["shape"]) for row in rows))
    labels = list(dict.fromkeys(label(row) for row in rows))
    figure = Figure(figsize=(4 + 3 * len(shapes), 1.5 + 0.25 * len(labels)), layout="constrained")
    colours = {"gptvq": "tab:blue", KERNEL: "tab:cyan", "torch": "tab:gray", "ggml": "tab:orange", "int4": "tab:green"}
    for axes, shape in zip(figure.subplots(1, len(shapes), squeeze=False, sharey=True)[0], shapes):
        for row in (row for row in rows if tuple(row["shape"]) == shape):
            axes.barh(len(labels) - labels.index(label(row)), row["gw_per_second"], color=colours[row["method"]])
        axes.set_title(f"{shape[0]} x {shape[1]}")
        axes.set_xlabel("1e9 weights per second")
        axes.margins(y=0.01)
        axes.set_yticks([len(labels) - i for i in range(len(labels))], labels)
    figure.suptitle(f"M {first['m']}, {first['cache']} caches, {threads} threads")
    try:
        figure.savefig(Path(path), dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot {path}: cannot be written ({error})") from error


if __name__ == "__main__":
    sys.exit(runner.run(main))
