"""What bench.quantize measures with --shape MODEL: one decoder layer of a model's sizes, its weights and inputs random."""
from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gptvq import solver
from gptvq.config import VQConfig
from gptvq.hessian import Hessian
from gptvq.solver import LayerRecord

from . import device as on
from . import runner


@dataclass(frozen=True)
class Model:
    """`layers` decoder layers; `groups` are linears that read one input, {name: rows} and its columns."""

    layers: int
    groups: tuple[tuple[dict[str, int], int], ...]


def llama(layers: int, width: int, inner: int, keys: int) -> Model:
    return Model(layers, (({"q_proj": width, "k_proj": keys, "v_proj": keys}, width), ({"o_proj": width}, width),
                          ({"gate_proj": inner, "up_proj": inner}, width), ({"down_proj": width}, inner)))


MODELS = {"llama2-7b": llama(32, 4096, 11008, 4096), "llama2-70b-layer": llama(80, 8192, 28672, 1024)}


def inputs(cols: int, samples: int, tokens: int, place: torch.device) -> Iterator[Tensor]:
    """bfloat16 [tokens, cols] per sample, of unlike sizes and correlated as those of a model are, always the same."""
    generator = torch.Generator(place).manual_seed(0)
    size = torch.randn(cols, generator=generator, device=place).exp()
    low = torch.randn(64, cols, generator=generator, device=place) / 8
    for _ in range(samples):
        x = torch.randn(tokens, cols, generator=generator, device=place)
        yield ((x + torch.randn(tokens, 64, generator=generator, device=place) @ low) * size).to(torch.bfloat16)


@torch.no_grad()
def measure(name: str, config: VQConfig, samples: int, tokens: int, place: torch.device, stages) -> list[LayerRecord]:
    """Solves every linear of one layer; `stages` (bench.quantize.Stages) counts while it runs. Inputs are made outside of its time."""
    records = []
    for group, cols in MODELS[name].groups:
        hessian = Hessian(cols, place)
        for x in inputs(cols, samples, tokens, place):
            on.synchronize(place)
            with stages:
                hessian.add(x)
        for linear, rows in group.items():
            weight = torch.randn(rows, cols, generator=torch.Generator(place).manual_seed(1), device=place) * 0.02
            on.synchronize(place)
            with stages:
                records.append(solver.solve(weight, hessian, config.spec(rows, cols, linear), config.recipe, linear)[1])
            runner.log(f"{linear:<10} {rows}x{cols}: error {100 * records[-1].error:.3f} %, {records[-1].seconds:.2f} s")
    return records


def rows(name: str, records: list[LayerRecord], stages, same: dict, place: torch.device) -> list[dict]:
    """Rows of the stages, of the whole layer, and of each linear. model_seconds: those of the layer times the model's layers."""
    layers, total, work = MODELS[name].layers, sum(stages.seconds.values()), sum(stages.cpu_seconds.values())
    found = [{"operation": "quantize", "method": "gptvq", **same, "shape": name, "layers": len(records), "stage": stage, "seconds": seconds,
              "cpu_seconds": stages.cpu_seconds.get(stage, work), "share": seconds / total, "model_seconds": seconds * layers,
              "model_cpu_seconds": stages.cpu_seconds.get(stage, work) * layers, "peak_bytes": on.peak_bytes(place)}
             for stage, seconds in (*stages.seconds.items(), ("all", total))]
    return found + [{"operation": "linear", "method": "gptvq", **same, "layer": record.name, "shape": [record.rows, record.cols],
                     "median_seconds": record.seconds, "error": record.error, "stages": dataclasses.asdict(record)["stages"],
                     "bits_per_value": record.bits_per_value, "ratio": {}, "speedup": {}} for record in records]
