"""Perplexity of a whole model: dense, rounded to nearest, by the published procedure and by ours."""
from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gptvq.calibration import read_tokens, tokens_sha256
from gptvq.config import VQConfig
from gptvq.evaluate import perplexity
from gptvq.hf import open_model
from gptvq.model import dense_weight, find_blocks, linears, unfuse_experts
from gptvq.quantize import quantize
from gptvq.report import Progress, layer_line

from .layers import RECIPES
from .rounding import bits_per_value, nearest_group, round_to_nearest
from .runner import log


NO_PRESET = ("dense", "gguf")       # methods of one format only


class LayerLog(Progress):
    """One line per linear."""

    def layer(self, record) -> None:
        log(layer_line(record))


def jobs(methods: list[str], presets: list[str]) -> list[tuple[str, str | None]]:
    """(method, preset) of every row."""
    return [(m, None) for m in NO_PRESET if m in methods] + [(m, preset) for preset in presets for m in methods if m not in NO_PRESET]


def measure(args, source: str, methods: list[str], presets: list[str]) -> Iterator[dict]:
    """One row per job, the model opened anew for each."""
    for method, preset in jobs(methods, presets):
        if method in RECIPES:
            config = VQConfig.preset(preset, recipe=RECIPES[method], seed=args.seed)
            report = quantize(source, None, config, calibration=args.calibration, samples=args.samples,
                              sequence_length=args.sequence_length, device=args.device, dtype=args.dtype, progress=LayerLog())
            model, tokens = report.model, read_tokens(args.text, report.tokenizer, "--text")
            row = {"format": config.spec(4096, 4096).form, "bits_per_value": report.bits_per_value,
                   "linear_bytes": report.packed_bytes, "mean_error": report.mean_error, "calibration": report.calibration,
                   "stages": report.stages, "warnings": report.warnings, "quantize_seconds": report.seconds}
            del report
        else:
            model, tokenizer = open_model(source, device=args.device, dtype=args.dtype)
            tokens = read_tokens(args.text, tokenizer, "--text")
            row = size(model, tokens) if method == "dense" else round_model(model, tokens, VQConfig.preset(preset))
        began = time.perf_counter()
        value = perplexity(model, tokens, args.window, args.max_windows)
        row = {"operation": "perplexity", "preset": preset, "method": method, **row, "perplexity": value,
               "text_sha256": tokens_sha256(tokens), "windows": min(len(tokens) // args.window, args.max_windows),
               "device": str(next(model.parameters()).device), "threads": torch.get_num_threads(),
               "evaluate_seconds": time.perf_counter() - began}
        log(f"{method} {preset or ''}: perplexity {value:.3f} at {row['bits_per_value']:.3f} bits per value, "
            f"{row['evaluate_seconds']:.0f} s to evaluate")
        del model
        yield row


def found_linears(model: nn.Module, tokens: Tensor) -> dict[str, nn.Module]:
    """What the job quantizes: all linears of the decoder blocks."""
    blocks = find_blocks(model, tokens[None, :8])
    unfuse_experts(model, blocks)
    return {name: linear for block in blocks for name, linear in linears(block.module, block.name).items()}


def size(model: nn.Module, tokens: Tensor) -> dict:
    """Format, bits and bytes of the linears as they are."""
    weights = [linear.weight for linear in found_linears(model, tokens).values()]
    nbytes = sum(w.numel() * w.element_size() for w in weights)
    return {"format": str(weights[0].dtype)[6:], "bits_per_value": 8 * nbytes / sum(w.numel() for w in weights),
            "linear_bytes": nbytes}


@torch.no_grad()
def round_model(model: nn.Module, tokens: Tensor, config: VQConfig) -> dict:
    """Rounds all linears in place to integers of about the size of `config`, with one group size for the whole model."""
    began = time.perf_counter()
    found = found_linears(model, tokens)
    shapes = {name: tuple(dense_weight(linear).shape) for name, linear in found.items()}
    specs = config.resolve(shapes)
    weights = sum(rows * cols for rows, cols in shapes.values())
    target = 8 * sum(spec.nbytes for spec in specs.values()) / weights
    group = nearest_group(max(cols for _, cols in shapes.values()), config.index_bits, target)
    for linear in found.values():
        weight = dense_weight(linear)
        weight.copy_(round_to_nearest(weight, config.index_bits, group))
    nbits = sum(rows * cols * bits_per_value(cols, config.index_bits, group) for rows, cols in shapes.values())
    return {"format": f"int{config.index_bits} group {group}", "bits_per_value": nbits / weights, "linear_bytes": round(nbits / 8),
            "quantize_seconds": time.perf_counter() - began}
