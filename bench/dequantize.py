"""python -m bench.dequantize: packed weight to dense, the compiled kernel against the reference."""
from __future__ import annotations

import statistics
import sys

import torch

from gptvq.backends import native, reference
from gptvq.config import VQConfig
from gptvq.errors import BackendUnavailable
from gptvq.weight import decode_tables

from . import runner
from .contenders import random_weight
from .layers import describe_format

PRESETS = ["1d-2.25", "1d-3.125", "2d-2.25", "2d-2.25-s64", "2d-3.125", "2d-4.125", "4d-2.25", "4d-3.125"]
EXAMPLE = """example:
  python -m bench.dequantize --json bench/results/dequantize.json

GB/s counts the packed bytes read and the dense bytes written once.  Hot: the same buffers again and again."""


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    device = torch.device("cpu")
    if not native.serves(device):
        raise BackendUnavailable(f"there is no kernel to measure: {native.why_not(device)}")
    dtype, before = getattr(torch, args.dtype), torch.get_num_threads()
    results = runner.Results("dequantize", argv, args.json, {"repeats": args.repeats})
    try:
        for rows, cols in args.shapes:
            for preset in args.presets:
                vq = random_weight(VQConfig.preset(preset), rows, cols)
                tensors = decode_tables(vq.spec, vq.buffers)
                for threads in args.threads:
                    torch.set_num_threads(threads)
                    times = runner.paired({"native": lambda: native.dequantize(*tensors, vq.spec, dtype),
                                           "reference": lambda: reference.dequantize(*tensors, vq.spec, dtype)}, args.repeats)
                    moved = vq.nbytes + rows * cols * dtype.itemsize
                    median = {name: statistics.median(found) for name, found in times.items()}
                    results.add([{
                        "operation": "dequantize", "method": name, "preset": preset, "format": describe_format(vq.spec),
                        "shape": [rows, cols], "dtype": args.dtype, "threads": threads, "device": "cpu", "cache": "hot",
                        "median_seconds": median[name], "gb_per_second": moved / median[name] / 1e9,
                        "speedup": {} if name == "reference" else {"reference": runner.ratio(times, name, "reference")},
                    } for name in times])
                    runner.log(f"{preset} {rows}x{cols}, {threads} threads: {median['native'] * 1e6:.0f} us")
    finally:
        torch.set_num_threads(before)
    print(show(results.rows))


def parser():
    p = runner.parser("dequantize", "Speed of dequantization.", EXAMPLE)
    p.add_argument("--shapes", type=runner.shapes, default=[(1536, 576), (2048, 2048)], metavar="RxC,RxC",
                   help="default 1536x576,2048x2048")
    p.add_argument("--presets", type=runner.names, default=PRESETS, metavar="A,B", help=f"default {','.join(PRESETS)}")
    p.add_argument("--threads", type=runner.numbers, default=[1, 2], metavar="N,M",
                   help="default 1,2")
    p.add_argument("--dtype", default="bfloat16", choices=("float32", "float16", "bfloat16"),
                   help="of the dense weight, default %(default)s")
    p.add_argument("--repeats", type=runner.positive, default=11, metavar="N",
                   help="samples of each, in turns, default %(default)s")
    return p


def show(rows: list[dict]) -> str:
    return runner.table(rows, {
        "format": lambda r: r["format"], "shape": lambda r: f"{r['shape'][0]}x{r['shape'][1]}", "method": lambda r: r["method"],
        "threads": lambda r: r["threads"], "cache": lambda r: r["cache"],
        "median, us": lambda r: f"{r['median_seconds'] * 1e6:,.0f}",
        "GB/s": lambda r: f"{r['gb_per_second']:.2f}", "x reference": lambda r: f"{r['speedup']['reference']:,.1f}"})


if __name__ == "__main__":
    sys.exit(runner.run(main))
