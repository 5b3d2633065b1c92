"""What bench.gemv measures with --device cuda: a pass over rotated weights as one CUDA graph, cuBLAS and a copy in the same run."""
from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gptvq.errors import BackendUnavailable

from . import device as on
from . import peers, runner
from .contenders import Contender, Shape, inputs

SHAPES = [(4096, 4096), (11008, 4096), (8192, 8192), (28672, 8192)]
CUBLAS = {"cublas fp16": torch.float16, "cublas bf16": torch.bfloat16}
COPY = "copy"


@torch.inference_mode()                 # whose inputs keep layers called on one of them from being computed together, as q, k and v are
def measure(args, argv: list[str] | None) -> list[dict]:
    """The rows of every shape and number of tokens; `args` are those of bench.gemv."""
    place = torch.device(args.device)
    results = runner.Results("gemv", argv, args.json, {"repeats": args.repeats, "dtype": args.dtype, "ring_bytes": on.RING_BYTES})
    for rows, cols in args.shapes or SHAPES:
        left_out: set[str] = set()
        for m in args.m:
            size = Size(rows, cols, m, getattr(torch, args.dtype), place)
            results.add(compare(size, args.presets, args.activations, args.repeats, left_out))
            runner.log(f"{rows}x{cols}, M {m}: {len(results.rows)} rows")
    return results.rows


class Size:
    """x [m, cols] and the contenders for it, each with as many copies of its weight as make the ring."""

    def __init__(self, rows: int, cols: int, m: int, dtype: torch.dtype, place: torch.device):
        self.rows, self.cols, self.m, self.dtype, self.place = rows, cols, m, dtype, place
        self.x = inputs(m, cols).to(place, dtype)
        self.shape = Shape(rows, cols, place, dtype, self.copies)

    @staticmethod
    def copies(nbytes: int) -> int:
        return -(-on.RING_BYTES // nbytes)

    def ring(self, name: str, row: dict, nbytes: int, products: list[Callable[[Tensor], Tensor]], x: Tensor) -> Contender:
        def run() -> Tensor:
            for product in products:
                y = product(x)
            return y

        row = {"method": name.split()[0], "preset": None, "format": name.partition(" ")[2], **row}
        return Contender(name, row, nbytes, len(products), run)

    def packed(self, preset: str, activations: list[str]) -> list[Contender]:
        return self.shape.packed(preset, activations, self.x, cold=True)

    def cublas(self, name: str) -> Contender:
        dtype = CUBLAS[name]
        nbytes = self.rows * self.cols * dtype.itemsize
        weights = [torch.randn(self.rows, self.cols, device=self.place, dtype=dtype) for _ in range(self.copies(nbytes))]
        return self.ring(name, {"bits_per_value": 8.0 * dtype.itemsize}, nbytes,
                         [lambda x, weight=weight: F.linear(x, weight) for weight in weights], self.x.to(dtype))

    def peer(self, name: str) -> Contender:
        first, bits = peers.layer(name, self.rows, self.cols, self.dtype, self.place)
        nbytes = round(bits * self.rows * self.cols / 8)
        more = [peers.layer(name, self.rows, self.cols, self.dtype, self.place)[0] for _ in range(self.copies(nbytes) - 1)]
        found = self.ring(name, {"bits_per_value": bits}, nbytes, [first, *more], self.x)
        found.run()                                     # some refuse only when called
        return found

    def copy(self) -> Contender:
        """Reads and writes as many bytes as the ring has, which is what a GPU's memory does at best."""
        source = torch.ones(on.RING_BYTES // 2, dtype=torch.uint8, device=self.place)
        target = torch.empty_like(source)
        return Contender(COPY, {"method": COPY, "preset": None, "format": "read and write", "bits_per_value": None}, 2 * source.numel(), 1,
                         lambda: target.copy_(source))


def compare(size: Size, presets: list[str], activations: list[str], repeats: int, left_out: set[str]) -> list[dict]:
    """The rows of all contenders for one x; `left_out` are names that the log has said the reason of."""
    found = [one for preset in presets for one in size.packed(preset, activations)]
    found += [size.cublas(name) for name in CUBLAS] + [size.copy()]
    for name in peers.PEERS:
        try:
            found.append(size.peer(name))
        except BackendUnavailable as error:
            if name not in left_out:
                runner.log(f"no rows of {name}: {error}")
            left_out.add(name)
    times = on.paired({one.name: on.graphed(one.run, size.place) for one in found}, repeats, size.place)
    times = {one.name: [value / one.calls for value in times[one.name]] for one in found}
    speed = {one.name: one.nbytes / statistics.median(times[one.name]) for one in found}
    baselines = [one.name for one in found if one.row["method"] not in ("gptvq", COPY)]
    return [{"operation": "copy" if one.name == COPY else "gemv" if size.m == 1 else "gemm", **one.row, "shape": [size.rows, size.cols],
             "m": size.m, "device": size.place.type, "threads": 1, "cache": "cold", "median_seconds": statistics.median(times[one.name]),
             "gb_per_second": speed[one.name] / 1e9,
             "gw_per_second": None if one.name == COPY else size.rows * size.cols * size.m / statistics.median(times[one.name]) / 1e9,
             "of_copy": speed[one.name] / speed[COPY],
             "speedup": {} if one.name == COPY else {name: runner.ratio(times, one.name, name) for name in baselines if name != one.name}}
            for one in found]
