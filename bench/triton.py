"""python -m bench.triton: the GPU backends against each other, cuBLAS and the memory: products, EM and column blocks."""
from __future__ import annotations

import functools
import statistics
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F

from gptvq import ops
from gptvq.backends import triton
from gptvq.config import PRESETS, VQConfig
from gptvq.errors import BackendUnavailable
from gptvq.triton_kernels import configs
from gptvq.weight import decode_tables

from . import runner
from .contenders import inputs, random_weight
from .layers import describe_format

BACKENDS = ("triton", "cuda", "reference")
RING_BYTES = 256 << 20                  # copies of a weight that a pass goes over: more than any GPU's last cache
EXAMPLE = """examples:
  python -m bench.triton --device cuda --json bench/results/triton.json
  python -m bench.triton --configs
  TRITON_INTERPRET=1 python -m bench.triton --device cpu --shapes 64x64 --m 1,9 --repeats 1

A pass of a product goes over a ring of copies of the weight, so that it comes from memory, and is replayed as one CUDA graph.  copy:
torch's copy of a large tensor, in bytes read and written.  GPTVQ_TRITON_TUNE=FILE measures configurations and keeps the best there."""


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.configs:
        print(table_of_configs())
        return
    device = torch.device(args.device)
    if not triton.serves(device):
        raise BackendUnavailable(f"--device {args.device}: {triton.why_not(device)}")
    runner.check_names("--presets", args.presets, PRESETS)
    runner.check_names("--backends", args.backends, BACKENDS)
    backends = {name: ops.BACKENDS[name] for name in args.backends if name in ops.BACKENDS and (
        name == "reference" or ops.BACKENDS[name].serves(device))}
    results = runner.Results("triton", argv, args.json, {"repeats": args.repeats, "dtype": args.dtype, "ring_bytes": RING_BYTES})
    for rows, cols in args.shapes:
        for preset in args.presets:
            results.add(quantization(preset, rows, cols, backends, device, args))
            for m in args.m:
                results.add(products(preset, rows, cols, m, backends, device, args))
            runner.log(f"{preset} {rows}x{cols}: {len(results.rows)} rows")
    print(show(results.rows))


def parser():
    p = runner.parser("triton", "Speed of the GPU kernels.", EXAMPLE)
    p.add_argument("--device", default="cuda", choices=("cpu", "cuda"), help="cpu: Triton's interpreter, to try it; default %(default)s")
    p.add_argument("--shapes", type=runner.shapes, default=[(4096, 4096), (11008, 4096), (8192, 8192), (28672, 8192)], metavar="RxC,RxC",
                   help="default 4096x4096,11008x4096,8192x8192,28672x8192")
    p.add_argument("--presets", type=runner.names, default=["2d-2.25", "2d-2.25-s64", "2d-3.125", "1d-4.125", "4d-2.25"], metavar="A,B",
                   help="default 2d-2.25,2d-2.25-s64,2d-3.125,1d-4.125,4d-2.25")
    p.add_argument("--m", type=runner.numbers, default=[1, 2, 4, 8, 16, 64, 256, 2048], metavar="N,M", help="tokens; default 1 to 2048")
    p.add_argument("--backends", type=runner.names, default=list(BACKENDS), metavar="A,B", help="default all that serve the device")
    p.add_argument("--dtype", default="float16", choices=("float32", "float16", "bfloat16"), help="of activations, default %(default)s")
    p.add_argument("--repeats", type=runner.positive, default=21, metavar="N", help="samples of each, in turns, default %(default)s")
    p.add_argument("--configs", action="store_true", help="print the table of configurations and measure nothing")
    return p


# ---- products
@torch.inference_mode()
def products(preset: str, rows: int, cols: int, m: int, backends: dict, device: torch.device, args) -> list[dict]:
    """y = W x of every backend, of torch with a dense weight, and a copy of as many bytes."""
    vq, dtype = random_weight(VQConfig.preset(preset), rows, cols), getattr(torch, args.dtype)
    x, dense = inputs(m, cols).to(device, dtype), vq.dequantize(dtype).to(device)
    sizes = {**dict.fromkeys(backends, vq.nbytes), "torch": dense.numel() * dense.element_size(), "copy": RING_BYTES}
    calls = {name: copies(sizes[name], device) for name in sizes}
    runs: dict[str, Callable[[], object]] = {}
    for name, backend in backends.items():
        tensors = [None if t is None else t.to(device) for t in decode_tables(vq.spec, vq.buffers)]
        layers = [backend.prepare_linear(*(None if t is None else t.clone() for t in tensors), None, vq.spec) for _ in range(calls[name])]
        runs[name] = functools.partial(in_turn, [functools.partial(layer, x, "a16") for layer in layers])
    runs["torch"] = functools.partial(in_turn, [functools.partial(F.linear, x, dense.clone()) for _ in range(calls["torch"])])
    source = torch.empty(RING_BYTES if device.type == "cuda" else vq.nbytes, dtype=torch.uint8, device=device)
    sizes["copy"] = 2 * source.numel()
    runs["copy"] = functools.partial(torch.empty_like(source).copy_, source)
    times = measure(runs, calls, device, args.repeats)
    about = {"operation": "linear", "preset": preset, "format": describe_format(vq.spec), "shape": [rows, cols], "m": m,
             "dtype": args.dtype}
    return [{**row(about, name, times, device), "gb_per_second": sizes[name] / statistics.median(times[name]) / 1e9} for name in runs]


def in_turn(functions: list[Callable[[], object]]) -> object:
    for function in functions:
        result = function()
    return result


def copies(nbytes: int, device: torch.device) -> int:
    """Weights in a ring that no cache holds; one where nothing is measured in earnest."""
    return -(-RING_BYTES // nbytes) if device.type == "cuda" and nbytes < RING_BYTES else 1


# ---- quantization
@torch.inference_mode()
def quantization(preset: str, rows: int, cols: int, backends: dict, device: torch.device, args) -> list[dict]:
    """Fitting the codebooks of one strip, and one block of 128 columns."""
    spec = VQConfig.preset(preset).spec(rows, cols)
    d, k, n = spec.dim, spec.codewords, min(128, spec.cols) // spec.dim
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device)

    points, vectors = spec.group_rows * spec.group_cols // d, spec.group_cols // d
    x, root = normal(spec.row_groups, points, d), normal(vectors, d, d) + 2 * torch.eye(d, device=device)
    starts, rounds = (4, ((10, 1), (40, 1))) if device.type == "cuda" else (1, ((1, 1),))
    picked = torch.randint(points, (starts, spec.row_groups, k, 1), generator=generator).to(device).expand(-1, -1, -1, d)
    seeds = x.expand(starts, -1, -1, -1).gather(2, picked)
    U = normal(n * d, n * d).triu(1) * 0.05 + torch.eye(n * d, device=device)
    roots = torch.linalg.inv(U.view(n, d, n, d).diagonal(dim1=0, dim2=2).permute(2, 0, 1))
    centroids, strip = normal(spec.row_groups, spec.strips, k, d), torch.arange(n, device=device) * d // spec.group_cols
    W = normal(rows, n * d)
    operations = {
        "fit": lambda backend: backend.fit(x, root @ root.transpose(1, 2), torch.ones(x.shape[:2], device=device), seeds, rounds),
        "column_block": lambda backend: backend.column_block(W, U, roots, centroids, strip, None, spec.group_rows, False,
                                                             spec.signs > 0)}
    found = []
    for operation, run in operations.items():
        about = {"operation": operation, "preset": preset, "format": describe_format(spec), "shape": [rows, cols], "dtype": "float32"}
        # The reference reads results back to the host, which no graph can hold: these are timed as they are called.
        times = measure({name: functools.partial(run, backend) for name, backend in backends.items()}, dict.fromkeys(backends, 1), device,
                        args.repeats, graph=False)
        found += [row(about, name, times, device) for name in times]
    return found


# ---- timing
def measure(runs: dict, calls: dict[str, int], device: torch.device, repeats: int, graph: bool = True) -> dict[str, list[float]]:
    """Seconds per call, in turns."""
    if device.type == "cuda" and graph:
        runs = {name: captured(run) for name, run in runs.items()}
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = runner.paired(runs, repeats, least=0.01 if device.type == "cuda" else 0.0001, synchronize=synchronize)
    return {name: [seconds / calls.get(name, 1) for seconds in times[name]] for name in times}


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """The launches of one call as a CUDA graph; `run` must not wait for the GPU."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()                                           # compiles and allocates
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def row(about: dict, name: str, times: dict[str, list[float]], device: torch.device) -> dict:
    return {**about, "method": name, "device": device.type, "threads": torch.get_num_threads(),
            "median_seconds": statistics.median(times[name]),
            "speedup": {other: runner.ratio(times, name, other) for other in times if other not in (name, "copy")}}


def show(rows: list[dict]) -> str:
    return runner.table(rows, {
        "operation": lambda r: r["operation"], "format": lambda r: r["format"], "shape": lambda r: f"{r['shape'][0]}x{r['shape'][1]}",
        "M": lambda r: r["m"], "backend": lambda r: r["method"], "median, us": lambda r: f"{r['median_seconds'] * 1e6:,.1f}",
        "GB/s": lambda r: f"{r['gb_per_second']:,.0f}", **runner.speedups(rows)})


def table_of_configs() -> str:
    rows = [{"kernel": name, "arch": arch, "default": str(options[0]), "others": ", ".join(map(str, options[1:]))}
            for name, lists in configs.TABLE.items() for arch, options in lists.items()]
    return runner.table(rows, {title: lambda r, title=title: r[title] for title in ("kernel", "arch", "default", "others")})


if __name__ == "__main__":
    sys.exit(runner.run(main))
