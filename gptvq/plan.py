"""plan(): what quantizing a model will give and take, from its shapes and one decoder block tried out for real."""
from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint, mixed
from .calibration import calibration_tokens, tokens_sha256
from .config import VQConfig
from .drift import Inputs, Stage, collect, find_stages, run_dense
from .errors import ConfigError
from .hessian import Hessian
from .model import Block, dense_weight, embed, find_blocks, linears, record_calls, unfuse_experts
from .report import Progress
from .solver import solve
from .spec import QuantSpec

#: Sequences that the tried block sees, and that sensitivities are measured on.
PROBE_SAMPLES, SENSITIVITY_SAMPLES = 3, 8
_ALIKE = 4                          # linears of one shape and format that are solved


@dataclass
class Plan:
    """What a run with these arguments gives and takes; bytes and seconds.

    `packed_bytes` and `bits_per_value` are exact, `other_bytes` those of all other tensors.  `seconds` by stage, `cpu_seconds` (of all
    threads together, which other programs disturb less), `peak_ram` and `peak_gpu` are predictions from `probe`, the block that was
    tried and on how many samples.  `errors` are {layer: {preset: relative error by a short recipe}} where a target asked for them.
    """

    model: str
    config: VQConfig
    specs: dict[str, QuantSpec]
    packed_bytes: int
    dense_bytes: int
    other_bytes: int
    seconds: dict[str, float]
    cpu_seconds: float
    peak_ram: int
    peak_gpu: int
    probe: dict[str, Any]
    errors: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    warnings: list[str] = dataclasses.field(default_factory=list)

    @property
    def bits_per_value(self) -> float:
        return 8 * self.packed_bytes / sum(spec.rows * spec.cols for spec in self.specs.values())

    @property
    def disk(self) -> int:
        """Bytes of the checkpoint's tensors."""
        return self.packed_bytes + self.other_bytes

    def to_dict(self) -> dict:
        return {**dataclasses.asdict(self), "config": self.config.to_dict(), "specs": {n: s.to_dict() for n, s in self.specs.items()},
                "bits_per_value": self.bits_per_value, "disk": self.disk, "total_seconds": sum(self.seconds.values())}


@torch.no_grad()
def plan(source: str | os.PathLike | nn.Module, config: VQConfig | str = "2d-2.25", *, calibration=None, samples: int = 128,
         sequence_length: int = 2048, device=None, dtype="auto", target_bytes: int | None = None, target_bits: float | None = None,
         presets: Sequence[str] = mixed.CANDIDATES, progress: Progress | None = None, tokenizer=None) -> Plan:
    """Predicts the run of `quantize` with the same arguments, by running one block: as many blocks as it has make up its time.

    With target_bytes (of all tensors) or target_bits (per quantized weight) every layer gets one of `presets`, so that the target is met
    and the summed layer error is least; that needs `calibration`, and `.config` is the outcome.  Without it the block is tried on
    random tokens.  A model given as a module has its fused experts unfused.  Raises ConfigError for a target out of reach.
    """
    from .hf import open_dense, pick_device

    config, progress = VQConfig.preset(config) if isinstance(config, str) else config, progress or Progress()
    device, began = pick_device(device), _clock()
    if target_bytes is not None and target_bits is not None:
        raise ConfigError("target_bytes and target_bits: give one of them")
    targeted = target_bytes is not None or target_bits is not None
    if targeted and calibration is None:
        raise ConfigError("a target needs calibration text, to measure how much each layer suffers")
    progress.stage("loading the model")
    if isinstance(source, nn.Module):
        model, name = source.eval(), type(source).__name__
    else:
        model, read_tokenizer, name = open_dense(source, dtype)
        tokenizer = read_tokenizer if tokenizer is None else tokenizer
    tokens = _random_tokens(model, samples, sequence_length) if calibration is None else calibration_tokens(
        calibration, tokenizer, samples, sequence_length, config.seed)
    samples, seconds = len(tokens), {"load": _clock() - began}
    blocks = find_blocks(model, tokens[:1])
    warnings = unfuse_experts(model, blocks)[1]
    modules = {full: linear for block in blocks for full, linear in linears(block.module, block.name).items()}
    shapes = {full: tuple(dense_weight(linear).shape) for full, linear in modules.items()}
    everything = sum(t.numel() * t.element_size() for t in checkpoint.unique_tensors(model).values())
    errors: dict = {}
    if targeted:
        choices = mixed.candidates(config, presets, shapes)
        dense_bytes = _dense_bytes(modules, choices)
        rest, weights = everything - dense_bytes, sum(rows * cols for full, (rows, cols) in shapes.items() if full in choices)
        budget = target_bytes - rest if target_bits is None else int(target_bits * weights / 8 + 1e-9)
        mixed.check_budget(choices, budget, rest)
        errors = mixed.sensitivities(model, blocks, tokens[:SENSITIVITY_SAMPLES], choices, device, progress)
        config = mixed.within_budget(config, choices, errors, budget)
        errors = {full: found for full, found in errors.items() if None not in found}
    specs = config.resolve(shapes)
    dense_bytes = _dense_bytes(modules, specs)

    probe = _Probe(model, blocks, modules, specs, config, tokens[:PROBE_SAMPLES], device, progress)
    share = samples / len(probe.tokens)
    largest = sum(spec.rows * spec.cols for full, spec in specs.items() if full in probe.names)
    weights = {full: spec.rows * spec.cols for full, spec in specs.items()}
    seconds["embed"] = probe.seconds["record"] + probe.seconds["embed"] * share
    for stage in ("forward", "hessians"):
        seconds[stage] = probe.seconds[stage] * share * sum(weights.values()) / largest
    seconds["solve"] = sum(probe.solve_seconds(spec) for spec in specs.values())
    tried = {"block": probe.block.name, "samples": len(probe.tokens), "of_samples": samples, "sequence_length": tokens.shape[1],
             "tokens_sha256": tokens_sha256(tokens), "seconds": float((_clock() - began)[0])}
    return Plan(name, config, specs, sum(spec.nbytes for spec in specs.values()), dense_bytes, everything - dense_bytes,
                {stage: float(both[0]) for stage, both in seconds.items()}, float(sum(seconds.values())[1]), probe.peak_ram(samples),
                probe.peak_gpu, tried, errors, warnings)


class _Probe:
    """One block run as `quantize` runs it, on a few samples: seconds of each stage (by the clock and of processors), peak memory.

    It is the middle one of the largest.  Of linears alike in shape and format a few are solved, also those that only other blocks have.
    """

    def __init__(self, model: nn.Module, blocks: list[Block], modules: dict[str, nn.Module], specs: dict[str, QuantSpec], config: VQConfig,
                 tokens: Tensor, device: torch.device, progress: Progress):
        self.tokens, self._device = tokens, device
        self.seconds: dict[str, Tensor] = {}
        self._solved: dict[tuple, list[Tensor]] = {}
        size = {b.name: sum(specs[full].rows * specs[full].cols for full in linears(b.module, b.name) if full in specs) for b in blocks}
        largest = [block for block in blocks if size[block.name] == max(size.values())]
        self.block = block = largest[len(largest) // 2]
        self.names = {full: modules[full] for full in linears(block.module, block.name) if full in specs}
        progress.stage(f"trying {block.name}")
        self._timed("record", record_calls, model, blocks, tokens[:1], device)
        hidden = self._timed("embed", embed, model, blocks, tokens)
        for before in blocks[: blocks.index(block)]:
            before.to(device)
            hidden = [before(state.to(device)).to(state.device) for state in hidden]
            before.to(next(model.parameters()).device)
        block.to(device)
        block(hidden[0].to(device))                     # what only a first call does
        self._start = _memory(reset=True)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        order, wanted, kept = [Stage(tuple(self.names))], {}, 2
        if config.recipe.compensate:
            order = find_stages(block, self.names, hidden[0].to(device))
            _, wanted = self._timed("forward", run_dense, block, order, self.names, hidden, device)
            kept = 3 + sum(wanted[name][0].numel() for name in wanted) / hidden[0].numel()
        for stage in order:
            members = {full: self.names[full] for full in stage.names}
            inputs = self._timed("hessians", collect, stage, members, block, hidden, wanted, device)
            for full in stage.names:
                self._solve(full, inputs, specs[full], config, progress)
        for spec in specs.values():
            if self._key(spec) not in self._solved and (alike := self._alike(spec, specs)) is not None:
                hessian = Hessian(spec.cols, device)
                hessian.add(torch.randn(4 * spec.cols, spec.cols, generator=torch.Generator().manual_seed(0)))
                self._solve(alike, Inputs({alike: hessian}), spec, config, progress)
        self._timed("forward", lambda: [block(state.to(device)) for state in hidden])
        self._state = hidden[0].numel() * hidden[0].element_size()
        self._kept, self._end = kept, _memory()
        self.peak_gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        block.to(next(model.parameters()).device)

    def solve_seconds(self, spec: QuantSpec) -> Tensor:
        """Of one linear in this format: the mean of those solved, or by the number of weights from those in the same format, or in any."""
        if self._key(spec) in self._solved:
            return sum(self._solved[self._key(spec)]) / len(self._solved[self._key(spec)])
        same = {key: s for key, s in self._solved.items() if key[2:4] == (spec.dim, spec.index_bits)} or self._solved
        return spec.rows * spec.cols * sum(map(sum, same.values())) / sum(key[0] * key[1] * len(s) for key, s in same.items())

    def peak_ram(self, samples: int) -> int:
        """Bytes, with the hidden states of `samples` in the place of the probe's."""
        more = (samples - len(self.tokens)) * self._kept * self._state
        return int(max(self._start.peak, self._end.peak + more))

    def _solve(self, full: str, inputs: Inputs, spec: QuantSpec, config: VQConfig, progress: Progress) -> None:
        solved = self._solved.setdefault(self._key(spec), [])
        if len(solved) < _ALIKE:
            progress.stage(f"solving {full}")
            began = _clock()
            weight = inputs.target(full, dense_weight(self.names[full]).float(), config.recipe)
            solve(weight, inputs.hessians[full], spec, config.recipe, full)
            solved.append(_clock() - began)

    def _alike(self, spec: QuantSpec, specs: dict[str, QuantSpec]) -> str | None:
        return next((full for full in self.names if (specs[full].rows, specs[full].cols) == (spec.rows, spec.cols)), None)

    @staticmethod
    def _key(spec: QuantSpec) -> tuple:
        return tuple(spec.to_dict().values())

    def _timed(self, stage: str, function, *args):
        began = _clock(self._device)
        result = function(*args)
        self.seconds[stage] = self.seconds.get(stage, 0.0) + _clock(self._device) - began
        return result


def _clock(device: torch.device | None = None) -> Tensor:
    """(seconds by the clock, processor seconds of all threads), once a GPU has done what it was given."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64)


@dataclass(frozen=True)
class _Memory:
    """Resident bytes of this process: now, and at most since the last reset."""

    now: int
    peak: int


def _memory(reset: bool = False) -> _Memory:
    status = Path("/proc/self/status")
    if not status.exists():
        return _Memory(0, 0)
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    found = _Memory(*(1024 * int(fields[name].split()[0]) for name in ("VmRSS", "VmHWM")))
    if reset:
        try:
            Path("/proc/self/clear_refs").write_text("5")       # the peak counts from here
        except OSError:
            pass                                        # not on this kernel: the peak since the start is an upper bound
    return found


def _dense_bytes(modules: dict[str, nn.Module], names) -> int:
    return sum(modules[full].weight.numel() * modules[full].weight.element_size() for full in names)


def _random_tokens(model: nn.Module, samples: int, sequence_length: int) -> Tensor:
    settings = getattr(model, "config", None)
    settings = settings.get_text_config() if hasattr(settings, "get_text_config") else settings
    positions = getattr(settings, "max_position_embeddings", None) or sequence_length
    return torch.randint(getattr(settings, "vocab_size", None) or 2, (samples, min(sequence_length, positions)),
                         generator=torch.Generator().manual_seed(0))
