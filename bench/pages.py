"""python -m bench.pages: cold weights of one token in large pages of memory against the same in small ones."""
from __future__ import annotations

import statistics
import sys

import torch
from torch import nn

from gptvq.config import PRESETS, VQConfig
from gptvq.dense import DenseHead
from gptvq.errors import BackendUnavailable
from gptvq.large_pages import SWITCH, settle, why_not
from gptvq.linear import VQLinear

from . import runner
from .contenders import RING_BYTES, SETTLE, label, random_weight
from .layers import describe_format

SHAPES = [(576, 576), (576, 1536), (1536, 576), (2048, 2048), (4096, 4096), (11008, 4096)]
KINDS = {"torch bf16": nn.Linear, "gptvq bf16": DenseHead}      # the latter is how an output head that stays dense multiplies
EXAMPLE = f"""example:
  python -m bench.pages --json bench/results/pages.json

Passes over as many layers as make 192 MB, inputs bfloat16, one token; each layer once in a tensor of its own, as torch allocates it, and
once in large pages.  x small: how many times faster from large pages than from small ones, median of paired ratios.  {SWITCH}=0 would
leave nothing to compare."""


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    print(show([row for path in args.table for row in runner.load(path)["rows"]] if args.table else measure(args, argv)))


def parser():
    p = runner.parser("pages", "Speed from large pages of memory.", EXAMPLE)
    p.add_argument("--shapes", type=runner.shapes, default=SHAPES, metavar="RxC,RxC", help="default those of SmolLM2 and larger ones")
    p.add_argument("--presets", type=runner.names, default=["2d-2.25-s64", "4d-3.125-s64"], metavar="A,B", help="default 2d-2.25-s64,4d-3.125-s64")
    p.add_argument("--threads", type=runner.numbers, default=[1, 2], metavar="N,M", help="default 1,2")
    p.add_argument("--repeats", type=runner.positive, default=11, metavar="N", help="samples of each, in turns, default %(default)s")
    p.add_argument("--table", nargs="+", metavar="FILE", help="measure nothing, print these result files")
    return p


def measure(args, argv: list[str] | None) -> list[dict]:
    runner.check_names("--presets", args.presets, PRESETS)
    if why_not():
        raise BackendUnavailable(f"no large pages to compare with: {why_not()}")
    before = torch.get_num_threads()
    results = runner.Results("pages", argv, args.json, {"repeats": args.repeats, "ring_bytes": RING_BYTES})
    try:
        for rows, cols in args.shapes:
            for name in [*args.presets, *KINDS]:
                for threads in args.threads:
                    torch.set_num_threads(threads)
                    results.add(compare(name, rows, cols, threads, args.repeats))
                runner.log(f"{name} {rows}x{cols}")
    finally:
        torch.set_num_threads(before)
    return results.rows


def compare(name: str, rows: int, cols: int, threads: int, repeats: int) -> list[dict]:
    small, large = ring(name, rows, cols), settle(ring(name, rows, cols))
    x = torch.randn(1, 1, cols, generator=torch.Generator().manual_seed(2)).bfloat16()
    times = runner.paired({"small": lambda: run(small, x), "large": lambda: run(large, x)}, repeats, settle=SETTLE)
    nbytes = sum(t.nbytes for t in small[0].state_dict().values())
    spec = getattr(small[0], "spec", None)
    what = {"method": name.split()[0], "preset": None, "format": "bf16"} if spec is None else {
        "method": "gptvq", "preset": name, "format": describe_format(spec)}
    return [{"operation": "gemv", **what, "pages": pages, "shape": [rows, cols], "threads": threads, "device": "cpu", "cache": "cold",
             "median_seconds": statistics.median(found) / len(small), "gb_per_second": nbytes * len(small) / statistics.median(found) / 1e9,
             "speedup": {"small": runner.ratio(times, pages, "small")}} for pages, found in times.items()]


def ring(name: str, rows: int, cols: int) -> nn.ModuleList:
    """Layers of one shape with tensors of their own."""
    def layer() -> nn.Module:
        if name not in KINDS:
            return VQLinear.from_weight(random_weight(config, rows, cols))
        dense = nn.Linear(cols, rows, bias=False, dtype=torch.bfloat16)
        dense.__class__ = KINDS[name]
        return dense

    config = None if name in KINDS else VQConfig.preset(name)
    first = layer()
    return nn.ModuleList([first, *(layer() for _ in range(RING_BYTES // sum(t.nbytes for t in first.state_dict().values())))])


@torch.inference_mode()
def run(layers: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    for layer in layers:
        y = layer(x)
    return y


def show(rows: list[dict]) -> str:
    return runner.table([row for row in rows if row["pages"] == "large"], {
        "weight": label, "shape": lambda r: f"{r['shape'][0]}x{r['shape'][1]}", "threads": lambda r: r["threads"],
        "median, us": lambda r: f"{r['median_seconds'] * 1e6:,.1f}", "GB/s": lambda r: f"{r['gb_per_second']:.1f}",
        "x small": lambda r: f"{r['speedup']['small']:.2f}"})


if __name__ == "__main__":
    sys.exit(runner.run(main))
