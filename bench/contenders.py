"""What bench.gemv and bench.decode time against each other: this package's VQLinear, torch, ggml, own INT4, a plain read."""
from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptvq.backends import native
from gptvq.config import ACTIVATIONS, VQConfig
from gptvq.errors import BackendUnavailable, ConfigError
from gptvq.large_pages import settle
from gptvq.linear import VQLinear
from gptvq.weight import DTYPES, VQWeight, decode_tables

from . import ggml, int4
from .layers import describe_format
from .runner import log

RING_BYTES = 192 << 20         # of copies that one pass goes over when caches are to be cold: enough for last ones of up to 48 MB
SETTLE = 0.01                   # seconds of rest before each sample: OpenMP threads spin for milliseconds after their work
TORCH = {"torch fp32": torch.float32, "torch bf16": torch.bfloat16}
# format, and whether in the file's order: llama.cpp repacks Q2_K where it can, which is not always faster
GGML = {"ggml Q4_0": ("Q4_0", False), "ggml Q4_K": ("Q4_K", False), "ggml Q2_K": ("Q2_K", False), "ggml Q2_K plain": ("Q2_K", True)}
INT4 = {"int4 a8": 8, "int4 a16": 16}
READ, KERNEL = "read", "gptvq kernel"
BASELINES = (*TORCH, *GGML, *INT4, READ)


def with_ggml(baselines: list[str]) -> tuple[list[str], str | None]:
    """(those of `baselines` that this machine has ggml for, what it has); the log says it once where ggml is missing."""
    if GGML.keys().isdisjoint(baselines):
        return baselines, None
    try:
        return baselines, ggml.libraries()
    except BackendUnavailable as error:
        log(f"no rows of ggml: {error}")
        return [name for name in baselines if name not in GGML], None


@dataclass
class Contender:
    """`run` computes `calls` products of one weight each and returns the last, [m, rows]; `nbytes` of each weight are read."""

    name: str
    row: dict                       # what a result says of it
    nbytes: int
    calls: int
    run: Callable[[], object]
    read: str | None = None         # name of the read probe over as many bytes
    layers: list[VQLinear] = field(default_factory=list)
    close: Callable[[], None] = field(default=lambda: None)


def label(row: dict) -> str:
    return " ".join(filter(None, (row["method"], row["preset"] or row["format"], row.get("activations"))))


def random_weight(config: VQConfig, rows: int, cols: int) -> VQWeight:
    """A packed weight with random codes and tables."""
    spec, generator = config.spec(rows, cols), torch.Generator().manual_seed(0)
    buffers = {}
    for name, (shape, kind) in spec.buffer_shapes().items():
        low, high = (spec.least_entry, 128) if kind == "int8" else (0, 256)
        buffers[name] = (torch.rand(shape, generator=generator).to(DTYPES[kind]) if DTYPES[kind].is_floating_point else
                         torch.randint(low, high, shape, dtype=DTYPES[kind], generator=generator))
    return VQWeight(spec, buffers)


def inputs(m: int, cols: int) -> Tensor:
    """float32 [m, cols], the same for all."""
    return torch.randn(m, cols, generator=torch.Generator().manual_seed(2))


def in_large_pages(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Copies, where they are on the CPU in large pages, one after another, as the weights of a loaded packed model are."""
    holder = nn.Module()
    with torch.inference_mode(False):
        for at, tensor in enumerate(tensors):
            holder.register_buffer(str(at), tensor.clone())         # those of inference mode cannot be moved
        return list(settle(holder).buffers())


class Shape:
    """All weights of one shape [rows, cols], made when first asked for, `copies(nbytes of one)` of each.

    Cold contenders go over all copies in a call, hot ones use the first again and again.
    """

    def __init__(self, rows: int, cols: int, device: torch.device, dtype: torch.dtype, copies: Callable[[int], int]):
        self.rows, self.cols, self.device, self.dtype, self.copies = rows, cols, device, dtype, copies
        self.rings: dict[str, list] = {}
        self.ggml: dict[str, ggml.Weights] = {}
        self.left_out: set[str] = set()
        # Quantizing is slow in some formats, and the rows' values do not matter to speed.
        self.some = torch.randn(min(rows, 256), cols, generator=torch.Generator().manual_seed(1))

    def contenders(self, presets: list[str], activations: list[str], baselines: list[str], m: int, threads: int,
                   cold: bool, alone: bool = False) -> list[Contender]:
        """Those that can run here, for x [m, cols]; the log says why others are left out.  alone: our kernels by themselves, too."""
        x, found = inputs(m, self.cols), []
        for preset in presets:
            found += self.packed(preset, activations, x, cold)
            found += self.kernels(preset, activations, x, threads, cold) if alone else []
            if READ in baselines and m == 1:
                found += self._tried(found[-1].read, lambda name: self.read(name, found[-1], threads, cold))
        for name in baselines:
            if name in TORCH:
                found.append(self.dense(name, x, cold))
            elif name in GGML:
                found += self._tried(name, lambda name: self.by_ggml(name, x, threads, cold))
            elif name in INT4 and m == 1:
                found += self._tried(name, lambda name: self.by_int4(name, x[0], threads, cold))
        return found

    def _tried(self, name: str, make: Callable[[str], Contender]) -> list[Contender]:
        try:
            return [make(name)]
        except (BackendUnavailable, ConfigError) as error:
            if name not in self.left_out:
                log(f"no rows of {name} for {self.rows}x{self.cols}: {error}")
            self.left_out.add(name)
            return []

    def _repeated(self, part: Tensor) -> Tensor:
        """[rows, ..] from the rows of `part`, over and over."""
        return part[torch.arange(self.rows) % len(part)]

    def packed(self, preset: str, activations: list[str], x: Tensor, cold: bool) -> list[Contender]:
        vq, x = random_weight(VQConfig.preset(preset), self.rows, self.cols), x.to(self.device, self.dtype)
        if preset not in self.rings:
            names, copies = list(vq.buffers), self.copies(vq.nbytes)
            tensors = in_large_pages(t.to(self.device) for _ in range(copies) for t in vq.buffers.values())
            self.rings[preset] = [dict(zip(names, tensors[at: at + len(names)])) for at in range(0, len(tensors), len(names))]
        ring = self.rings[preset] if cold else self.rings[preset][:1]

        def contender(kind: str) -> Contender:
            layers = [VQLinear.from_weight(VQWeight(vq.spec, buffers)) for buffers in ring]
            for layer in layers:
                layer.activations = kind

            def run() -> Tensor:
                for layer in layers:
                    y = layer(x)
                return y

            row = {"method": "gptvq", "preset": preset, "format": describe_format(vq.spec), "activations": kind,
                   "bits_per_value": vq.bits_per_value}
            return Contender(f"gptvq {preset} {kind}", row, vq.nbytes, len(layers), run, f"{READ} {preset}", layers)

        return [contender(kind) for kind in activations]

    def kernels(self, preset: str, activations: list[str], x: Tensor, threads: int, cold: bool) -> list[Contender]:
        """As `packed`, on the CPU: the compiled function alone, called with addresses, which costs little more than ggml's and INT4's loops."""
        spec, x = VQConfig.preset(preset).spec(self.rows, self.cols), x.to(self.dtype)
        ring, y = self.rings[preset] if cold else self.rings[preset][:1], x.new_empty(len(x), self.rows)
        weights = [native.prepare_linear(*decode_tables(spec, buffers), None, spec) for buffers in ring]

        def contender(kind: str) -> Contender:
            call = x.data_ptr(), native._TYPES[self.dtype], len(x), y.data_ptr(), native._MODES[kind], threads

            def run() -> Tensor:
                for weight in weights:
                    weight.kernel.run(*call)
                return y

            row = {"method": KERNEL, "preset": preset, "format": describe_format(spec), "activations": kind,
                   "bits_per_value": spec.bits_per_value}
            return Contender(f"{KERNEL} {preset} {kind}", row, spec.nbytes, len(weights), run, f"{READ} {preset}")

        return [contender(kind) for kind in activations]

    def dense(self, name: str, x: Tensor, cold: bool) -> Contender:
        dtype, nbytes = TORCH[name], self.rows * self.cols * TORCH[name].itemsize
        if name not in self.rings:
            weight = self._repeated(self.some).to(self.device, dtype)
            self.rings[name] = in_large_pages(weight for _ in range(self.copies(nbytes)))
        weights, x = self.rings[name] if cold else self.rings[name][:1], x.to(self.device, dtype)

        def run() -> Tensor:
            for weight in weights:
                y = F.linear(x, weight)
            return y

        row = {"method": "torch", "preset": None, "format": name.split()[1], "bits_per_value": 8.0 * dtype.itemsize}
        return Contender(name, row, nbytes, len(weights), run)

    def by_ggml(self, name: str, x: Tensor, threads: int, cold: bool) -> Contender:
        kind, plain = GGML[name]
        if name not in self.ggml:
            data = self._repeated(torch.from_numpy(ggml.quantize(kind, self.some.numpy()))).numpy()
            self.ggml[name] = ggml.Weights(kind, data, self.cols, self.copies(data.nbytes), plain)
        weights = self.ggml[name]
        products = ggml.Products(weights, x.numpy(), threads, 0 if cold else _again(weights.nbytes))
        row = {"method": "ggml", "preset": None, "format": name.removeprefix("ggml "), "buffer": weights.buffer, "activations": "a8",
               "bits_per_value": 8 * weights.nbytes / (self.rows * self.cols)}
        return Contender(name, row, weights.nbytes, products.calls, products, close=products.close)

    def by_int4(self, name: str, x: Tensor, threads: int, cold: bool) -> Contender:
        if "int4" not in self.rings:
            int4.load()
            packed = int4.pack(*(self._repeated(part) for part in int4.quantize(self.some)))
            self.rings["int4"] = in_large_pages(packed for _ in range(self.copies(packed.numel())))
        ring = self.rings["int4"]
        nbytes = ring[0].numel()
        products = int4.Products(ring if cold else ring[:1] * _again(nbytes), self.rows, x, INT4[name], threads)
        row = {"method": "int4", "preset": None, "format": "group 32", "activations": f"a{INT4[name]}",
               "bits_per_value": 8 * nbytes / (self.rows * self.cols)}
        return Contender(name, row, nbytes, products.calls, products)

    def read(self, name: str, packed: Contender, threads: int, cold: bool) -> Contender:
        """The probe over as many bytes as `packed` has, rounded down to cache lines."""
        nbytes = max(64, packed.nbytes // 64 * 64)
        int4.load()
        needed = nbytes * (self.copies(nbytes) if cold else 1)
        if len(self.rings.get(READ, ())) < needed:
            self.rings[READ], = in_large_pages([torch.ones(needed, dtype=torch.uint8)])
        stretches = list(self.rings[READ][:needed].split(nbytes))
        reads = int4.Reads(stretches if cold else stretches * _again(nbytes), threads)
        return Contender(name, {**packed.row, "method": READ, "activations": None}, nbytes, reads.calls, reads)

    def close(self) -> None:
        for weights in self.ggml.values():
            weights.close()
        self.rings.clear()


def _again(nbytes: int) -> int:
    """How often a contender that loops by itself uses its one hot weight in a call."""
    return max(1, min(256, (32 << 20) // nbytes))
