"""Relative layer errors on real layers: ours, the published procedure, GPTQ and round to nearest, at the same size."""
from __future__ import annotations

import fnmatch
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gptvq.calibration import calibration_tokens, describe, tokens_sha256
from gptvq.config import Recipe, VQConfig
from gptvq.errors import ConfigError
from gptvq.hessian import Hessian
from gptvq.model import InputCollector, dense_weight, find_blocks, linears
from gptvq.solver import solve
from gptvq.spec import QuantSpec

from . import mended
from .gptq import gptq
from .rounding import bits_per_value, nearest_group, round_to_nearest
from .runner import log

RECIPES = {"paper": Recipe.paper(), mended.METHOD: Recipe.paper(), "gptvq": Recipe()}
SIDES = ("calibration", "heldout")


@dataclass
class Layer:
    """One linear of the dense model: weight [rows, cols] float32, and a Hessian of its inputs for each text."""

    name: str
    weight: Tensor
    hessians: dict[str, Hessian]

    def error(self, quantized: Tensor, side: str) -> float:
        """tr((W-Q) H (W-Q)^T) / tr(W H W^T)."""
        H, delta = self.hessians[side].matrix(), self.weight - quantized
        return float(((delta @ H) * delta).sum(dtype=torch.float64) / ((self.weight @ H) * self.weight).sum(dtype=torch.float64))


class _Enough(Exception):
    """The last wanted block has run."""


@torch.no_grad()
def collect(model: nn.Module, tokens: dict[str, Tensor], blocks: list[int], patterns: list[str],
            device: torch.device) -> list[Layer]:
    """The linears of `blocks` whose last name matches one of `patterns`, in model order.

    `tokens` holds ids [samples, n] for some of SIDES; their Hessians are those of the dense model's inputs.
    """
    found = find_blocks(model, next(iter(tokens.values()))[:1])
    if max(blocks) >= len(found):
        raise ConfigError(f"--blocks: got {max(blocks)}, the model has the blocks 0 to {len(found) - 1}")
    wanted = {name: linear for b in sorted(set(blocks)) for name, linear in linears(found[b].module, found[b].name).items()
              if any(fnmatch.fnmatchcase(name.rpartition(".")[2], p) for p in patterns)}
    if not wanted:
        names = sorted({name.rpartition(".")[2] for name in linears(found[0].module, "")})
        raise ConfigError(f"--linears: {', '.join(patterns)} match nothing; a block of this model has {', '.join(names)}")

    def enough(*_):
        raise _Enough

    collected = {}
    for side in tokens:
        began = time.perf_counter()
        handle = found[max(blocks)].module.register_forward_hook(enough)
        try:
            with InputCollector(wanted, device) as collector:
                for ids in tokens[side]:
                    collector.next_sample()
                    try:
                        model(ids[None].to(next(model.parameters()).device), use_cache=False)
                    except _Enough:
                        pass
        finally:
            handle.remove()
        collected[side] = {name: collector.hessian(name) for name in wanted}
        log(f"Hessians of {len(wanted)} layers, {side}: {tokens[side].numel():,} tokens, {time.perf_counter() - began:.0f} s")
    return [Layer(name, dense_weight(linear).to(device, torch.float32, copy=True), {side: collected[side][name] for side in tokens})
            for name, linear in wanted.items()]


def read(args, tokenizer) -> tuple[dict[str, Tensor], dict]:
    """(ids of both texts, what identifies them in a result file)."""
    sources = {"calibration": args.calibration, "heldout": args.heldout}
    tokens = {side: calibration_tokens(source, tokenizer, args.samples, args.sequence_length, args.seed)
              for side, source in sources.items()}
    return tokens, {side: {"source": describe(sources[side]), "tokens": ids.numel(), "sha256": tokens_sha256(ids)}
                    for side, ids in tokens.items()}


def measure(layers: list[Layer], presets: list[str], methods: list[str], device: torch.device) -> Iterator[list[dict]]:
    """For every preset the rows of all layers and methods, then one row per method for their mean."""
    for preset in presets:
        rows = []
        for layer in layers:
            spec = VQConfig.preset(preset).spec(*layer.weight.shape, layer.name)
            for method in methods:
                row = {"operation": "layer error", "preset": preset, "layer": layer.name, "shape": [spec.rows, spec.cols],
                       "method": method, "device": str(device), "threads": torch.get_num_threads(), **_quantize(layer, spec, method)}
                rows.append(row)
                log(f"{preset:<11} {layer.name:<34} {method:<12} {row['bits_per_value']:.3f} bpv, "
                    f"error {100 * row['error_calibration']:.3f} %, held out {100 * row['error_heldout']:.3f} %, "
                    f"{row['seconds']:.1f} s")
        yield rows + [_mean([row for row in rows if row["method"] == method]) for method in methods]


def _quantize(layer: Layer, spec: QuantSpec, method: str) -> dict:
    began = time.perf_counter()
    if method in ("rtn", "gptq"):
        group = nearest_group(spec.cols, spec.index_bits, spec.bits_per_value)
        quantized = round_to_nearest(layer.weight, spec.index_bits, group) if method == "rtn" else gptq(
            layer.weight, Hessian.from_matrix(layer.hessians["calibration"].matrix()), spec.index_bits, group)
        row = {"format": f"int{spec.index_bits} group {group}", "bits_per_value": bits_per_value(spec.cols, spec.index_bits, group),
               "seconds": time.perf_counter() - began, "repair": ""}
    else:
        # A fresh Hessian: a factor kept from the method before would not be in the seconds of this one.
        hessian = Hessian.from_matrix(layer.hessians["calibration"].matrix())
        with mended.solving(method):
            vq, record = solve(layer.weight, hessian, spec, RECIPES[method], layer.name)
        quantized = vq.dequantize()
        row = {"format": describe_format(spec), "bits_per_value": vq.bits_per_value, "seconds": time.perf_counter() - began,
               "repair": record.repair, "stages": record.stages}
    return {**row, **{f"error_{side}": layer.error(quantized, side) for side in SIDES}}


def describe_format(spec: QuantSpec) -> str:
    """For instance "2D K16 4x256 s64": dimension, centroids, group, scale block."""
    scales = f" s{spec.scale_block}" if spec.scale_block else ""
    return f"{spec.form} {spec.group_rows}x{spec.group_cols}{scales}"


def _mean(rows: list[dict]) -> dict:
    first = rows[0]
    same = {key: first[key] for key in ("operation", "preset", "method", "device", "threads")}
    means = {key: sum(row[key] for row in rows) / len(rows) for key in ("bits_per_value", "error_calibration", "error_heldout")}
    return {**same, "layer": "mean", "shape": None, "format": " ".join(first["format"].split()[:2]), **means,
            "layers": len(rows), "seconds": sum(row["seconds"] for row in rows), "repair": ""}
