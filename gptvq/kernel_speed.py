"""How fast this machine's kernels are: one token times one packed weight, against torch and against reading the bytes."""
from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from .config import ACTIVATIONS, PRESETS, VQConfig
from .errors import ConfigError
from .linear import VQLinear
from .weight import DTYPES, VQWeight

RING_BYTES = 192 << 20      # of copies that are read in turn, more than caches hold, as the layers of a model are
MOST_COPIES = 4096          # of a small shape, which then comes from the caches
SAMPLES = 7


def measure(shapes: Sequence[tuple[int, int]] = ((4096, 4096),), presets: Sequence[str] = ("2d-2.25", "2d-2.25-s64", "2d-3.125", "4d-2.25"),
            activations: Sequence[str] = ("a16", "a8"), device: str | torch.device = "cpu", progress: Callable[[str], None] = lambda text: None
            ) -> list[dict]:
    """One dict per shape and contender: name, shape, bits, microseconds, gb_per_second, speedup over torch's dense bfloat16, and of_read.

    Medians of SAMPLES samples, the contenders of a shape in turns.  of_read: the time torch takes to sum as many bytes, as a part of the
    contender's.  Weights are random: the time does not depend on them.  They come from memory, unless MOST_COPIES fit into the caches.
    Raises ConfigError for unknown names and for shapes without a format.
    """
    for kind, given, known in (("preset", presets, PRESETS), ("activations", activations, ACTIVATIONS)):
        for name in given:
            if name not in known:
                raise ConfigError(f"{kind}: got {name!r}, need one of {', '.join(known)}")
    device, rows = torch.device(device), []
    for shape in shapes:
        progress(f"{shape[0]} x {shape[1]}")
        rows += _compare(shape, presets, activations if device.type == "cpu" else ["a16"], device)
    return rows


@torch.inference_mode()
def _compare(shape: tuple[int, int], presets: Sequence[str], activations: Sequence[str], device: torch.device) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, shape[1], generator=generator).to(device)
    contenders: dict[str, tuple[int, Callable[[], object]]] = {}
    for preset in presets:
        nbytes = VQConfig.preset(preset).spec(*shape, preset).nbytes
        ring = [random_layer(preset, shape, generator).to(device) for _ in range(_copies(nbytes))]
        for kind in activations:
            contenders[f"gptvq {preset} {kind}" if len(activations) > 1 else f"gptvq {preset}"] = nbytes, _in_turn(ring, x, kind)
    for name, dtype in (("torch bfloat16", torch.bfloat16), ("torch float32", torch.float32)):
        nbytes = shape[0] * shape[1] * dtype.itemsize
        ring = [torch.randn(shape, dtype=dtype, device=device) for _ in range(_copies(nbytes))]
        weights, input_ = itertools.cycle(ring), x.to(dtype)
        contenders[name] = nbytes, lambda weights=weights, input_=input_: torch.nn.functional.linear(input_, next(weights))
    whole = torch.ones(RING_BYTES // 4, device=device)
    contenders["read"] = RING_BYTES, whole.sum
    times = _times([run for _, run in contenders.values()], device)
    per_byte = times[-1] / RING_BYTES
    baseline = times[list(contenders).index("torch bfloat16")]
    rows = [{"name": name, "shape": list(shape), "bits": 8 * nbytes / (shape[0] * shape[1]), "microseconds": 1e6 * seconds,
             "gb_per_second": nbytes / seconds / 1e9, "speedup": baseline / seconds, "of_read": per_byte * nbytes / seconds}
            for (name, (nbytes, _)), seconds in zip(contenders.items(), times)]
    return [*rows[:-1], {"name": "read", "shape": list(shape), "gb_per_second": rows[-1]["gb_per_second"]}]


def _copies(nbytes: int) -> int:
    return max(2, min(-(-RING_BYTES // nbytes), MOST_COPIES))


def random_layer(preset: str, shape: tuple[int, int], generator: torch.Generator) -> VQLinear:
    """A packed layer whose codes and centroids are random."""
    spec = VQConfig.preset(preset).spec(*shape, preset)
    buffers = {}
    for name, (size, kind) in spec.buffer_shapes().items():
        if kind in ("uint8", "int8"):
            buffers[name] = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8).view(DTYPES[kind])
            if name == "cb" and spec.signs:
                buffers[name] = buffers[name].clamp_min(spec.least_entry)
        else:
            buffers[name] = torch.full(size, 1e-3, dtype=DTYPES[kind])
    return VQLinear.from_weight(VQWeight(spec, buffers))


def _in_turn(ring: list[VQLinear], x: torch.Tensor, activations: str) -> Callable[[], object]:
    for layer in ring:                  # what a layer prepares when it is first called is not to be timed
        layer.activations = activations
        layer(x)
    layers = itertools.cycle(ring)

    def run():
        layer = next(layers)
        layer.activations = activations
        return layer(x)                 # an inference tensor: layers that share one are not computed together

    return run


def _times(runs: list[Callable[[], object]], device: torch.device) -> list[float]:
    """Median seconds per call of each, of samples of about 20 ms in turns."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def sample(run: Callable[[], object], loops: int) -> float:
        wait()
        began = time.perf_counter()
        for _ in range(loops):
            run()
        wait()
        return (time.perf_counter() - began) / loops

    loops = []
    for run in runs:
        run()
        loops.append(max(1, round(0.02 / max(sample(run, 1), 1e-6))))
    found: list[list[float]] = [[] for _ in runs]
    for _ in range(SAMPLES):
        for times, run, n in zip(found, runs, loops):
            times.append(sample(run, n))
    return [statistics.median(times) for times in found]
