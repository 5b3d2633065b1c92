"""quantize(): a whole model, one straight loop over its decoder blocks."""
from __future__ import annotations

import os
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from . import checkpoint
from .calibration import calibration_tokens, describe, tokens_sha256
from .config import VQConfig
from .drift import Stage, collect, find_stages, run_dense
from .errors import ConfigError, NumericalError
from .linear import VQLinear
from .model import (
    Block,
    dense_weight,
    embed,
    find_blocks,
    in_list,
    linears,
    record_calls,
    unfuse_experts,
)
from .report import Progress, Report
from .solver import solve
from .spec import LAYOUT_VERSION


def quantize(model: str | os.PathLike | nn.Module, out: str | os.PathLike | None, config: VQConfig | str = "2d-2.25", *,
             calibration, samples: int = 128, sequence_length: int = 2048, device=None, dtype="auto", overwrite: bool = False,
             progress: Progress | None = None, tokenizer=None) -> Report:
    """Quantizes every linear in the decoder blocks of `model` and writes a packed checkpoint into the folder `out`.

    model: a folder, a hub id, a .gguf file, or a module, which is changed in place and for text calibration needs
    `tokenizer`.  out: a new or empty folder (`overwrite` replaces a checkpoint in it), or None to keep the result in memory.
    config: a VQConfig or a preset's name.  calibration: text, a path, a dataset's name, strings, or ids [samples, tokens].
    device: where blocks run and are solved, one at a time; None is the GPU where there is one.  dtype: to load the model in.
    Memory: beside the model, two hidden states of every calibration token (the dense model's and the quantized one's) and, for
    the block at hand, about four more; `Recipe(compensate=0)` needs only one.
    The report holds the quantized model (`.model`, runs at once) and the tokenizer.  Raises ConfigError for unusable
    arguments, before any work, and NumericalError for non-finite weights or activations; nothing unfinished is left in `out`.
    """
    began, progress = time.perf_counter(), progress or Progress()
    config = VQConfig.preset(config) if isinstance(config, str) else config
    if not isinstance(config, VQConfig):
        raise ConfigError(f"config: got {type(config).__name__}, need a VQConfig or a preset's name")
    fresh = out is not None and not Path(out).exists()
    folder = None if out is None else checkpoint.prepare(out, overwrite, model)
    try:
        report = _quantize(model, folder, config, calibration, samples, sequence_length, device, dtype, progress, tokenizer)
        report.seconds = time.perf_counter() - began
        if folder is not None:
            progress.stage("writing the checkpoint")
            checkpoint.save(report.model, report.tokenizer, folder, report)
    except BaseException:
        if fresh and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        raise
    progress.finish(report)
    return report


@torch.no_grad()
def _quantize(source, folder, config, calibration, samples, sequence_length, device, dtype, progress, tokenizer) -> Report:
    from .hf import attach, open_dense, pick_device

    stages: dict[str, float] = {}
    device = pick_device(device)
    progress.stage("loading the model")
    with _timed(stages, "load"):
        if isinstance(source, nn.Module):
            model, name = source.eval(), type(source).__name__
        else:
            model, read_tokenizer, name = open_dense(source, dtype)
            tokenizer = read_tokenizer if tokenizer is None else tokenizer
        if folder is not None and not hasattr(model, "config"):
            raise ConfigError(f"{name}: only Hugging Face models can be written to a folder; pass out=None")
        tokens = calibration_tokens(calibration, tokenizer, samples, sequence_length, config.seed)
        _check_tokens(model, tokens)

    blocks = find_blocks(model, tokens[:1])
    experts, warnings = unfuse_experts(model, blocks)
    modules = {full: linear for block in blocks for full, linear in linears(block.module, block.name).items()}
    specs = config.resolve({full: tuple(dense_weight(linear).shape) for full, linear in modules.items()})
    for full in specs:
        if not bool(torch.isfinite(modules[full].weight).all()):
            raise NumericalError(f"{full}: the weight holds {int((~torch.isfinite(modules[full].weight)).sum())} non-finite values; the "
                                 "source checkpoint is damaged or its dtype overflowed")
    report = Report(name, config, warnings=warnings, tokenizer=tokenizer, model=model, stages=stages, calibration={
        "source": describe(calibration), "samples": tokens.shape[0], "sequence_length": tokens.shape[1], "tokens": tokens.numel(),
        "sha256": tokens_sha256(tokens)})
    report.dense_bytes = sum(modules[full].weight.numel() * modules[full].weight.element_size() for full in specs)
    report.other_bytes = sum(t.numel() * t.element_size() for t in checkpoint.unique_tensors(model).values()) - report.dense_bytes
    if folder is not None:
        checkpoint.require_space(folder, report.other_bytes + sum(spec.nbytes for spec in specs.values()))
    progress.start(sum(spec.rows * spec.cols for spec in specs.values()), len(blocks))

    progress.stage("embedding the calibration samples")
    with _timed(stages, "embed"):
        record_calls(model, blocks, tokens[:1], device)
        hidden = embed(model, blocks, tokens)
    dense = list(hidden) if config.recipe.compensate else []    # as `hidden`, but of the dense model
    for index, block in enumerate(blocks):
        progress.block(index, block.name)
        home = next(block.module.parameters()).device
        block.to(device)
        names = {full: modules[full] for full in linears(block.module, block.name) if full in specs}
        order, wanted = [Stage(tuple(names))], {}
        if config.recipe.compensate:
            progress.stage("running the dense block")
            with _timed(stages, "forward"):
                order = find_stages(block, names, hidden[0].to(device))
                dense, wanted = run_dense(block, order, names, dense, device)

        packed: dict[str, VQLinear] = {}
        for stage in order:
            progress.stage("collecting Hessians")
            with _timed(stages, "hessians"):
                inputs = collect(stage, {full: modules[full] for full in stage.names}, block, hidden, wanted, device)
            for full in stage.names:
                linear, hessian = modules[full], inputs.hessians[full]
                if hessian.tokens + hessian.dropped == 0:
                    if not any(full.startswith(expert + ".") for expert in experts) and not in_list(block, full):
                        warnings.append(f"{full}: never called in the calibration runs, left dense")
                        continue
                    warnings.append(f"{full}: saw no calibration tokens, quantized without them; more samples would help")
                progress.stage(f"solving {full}")
                with _timed(stages, "solve"):
                    weight = inputs.target(full, dense_weight(linear).float(), config.recipe)
                    vq, record = solve(weight, hessian, specs[full], config.recipe, full)
                packed[full] = VQLinear.from_weight(vq, linear.bias, full)
                report.layers.append(record)
                progress.layer(record)
                # The same values unpacked once, not again for every sample.
                model.set_submodule(full, packed[full].to_dense(linear.weight.dtype))
                del modules[full]

        progress.stage("running the quantized block")
        with _timed(stages, "forward"):
            hidden = [_finite(block(state.to(device)), block).to(state.device) for state in hidden]
        for full, linear in packed.items():
            model.set_submodule(full, linear)
        block.to(home)
        block.args, block.kwargs = (), {}

    quantized = {record.name: record.spec.to_dict() for record in report.layers}
    left = sum(modules[full].weight.numel() * modules[full].weight.element_size() for full in specs if full not in quantized)
    report.dense_bytes, report.other_bytes = report.dense_bytes - left, report.other_bytes + left
    if hasattr(model, "config"):
        attach(model, {"version": checkpoint.VERSION, "layout_version": LAYOUT_VERSION, "config": config.to_dict(), "layers": quantized,
                       "bits_per_value": report.bits_per_value, "calibration": report.calibration, "experts": experts})
    return report


def _check_tokens(model: nn.Module, tokens: Tensor) -> None:
    """Raises ConfigError for ids beyond the vocabulary and for samples longer than the model's positions."""
    settings = getattr(model, "config", None)
    if hasattr(settings, "get_text_config"):
        settings = settings.get_text_config()
    vocabulary = getattr(settings, "vocab_size", None)
    if vocabulary and int(tokens.max()) >= vocabulary:
        raise ConfigError(f"calibration tokens: got the id {int(tokens.max())}, the model's vocabulary ends at {vocabulary - 1}; use the "
                          "model's own tokenizer")
    positions = getattr(settings, "max_position_embeddings", None)
    if positions and tokens.shape[1] > positions:
        raise ConfigError(f"calibration samples of {tokens.shape[1]} tokens are longer than the model's {positions} positions; set "
                          f"sequence_length={positions} or less")


def _finite(hidden: Tensor, block: Block) -> Tensor:
    if not bool(torch.isfinite(hidden).all()):
        raise NumericalError(f"{block.name}: its output holds {int((~torch.isfinite(hidden)).sum())} non-finite activations; the source "
                             "checkpoint is damaged or its dtype overflowed, try dtype float32")
    return hidden


@contextmanager
def _timed(stages: dict[str, float], stage: str):
    began = time.perf_counter()
    try:
        yield
    finally:
        stages[stage] = stages.get(stage, 0.0) + time.perf_counter() - began
