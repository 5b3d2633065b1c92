"""plan(): what quantizing a model will give and take, from its shapes and one decoder block tried out for real."""
from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import mixed
from .ahead import locked_bytes
from .calibration import calibration_windows, random_tokens, require_usable, text_config, tokens_sha256
from .config import DEFAULT_PRESET, VQConfig
from .drift import Inputs, Stage, collect, find_stages, run_dense, uncalled
from .errors import ConfigError
from .evaluate import divergence_bytes
from .head import find_head
from .hessian import Hessian
from .journal import Journal
from .machine import resident_memory, trim_memory
from .model import dense_weight, embed
from .ranks import Samples
from .report import Progress
from .shortcuts import Shortcuts
from .solver import solve
from .spec import QuantSpec
from .storage import temporary_folder
from .stream import BlockStream, open_stream, reads_ahead, states_on_device, states_on_disk

#: Sequences that the tried block sees, that layer errors are measured on, and gradients of the loss.
PROBE_SAMPLES, SENSITIVITY_SAMPLES, GRADIENT_SAMPLES = 4, 8, 4
_CUTS = (0, 1, 1, 1, 1, 2, 2, 3, 4)     # of the probe's chunks: as many sums wait for each other as in a run
_ALIKE = 4                          # linears of one shape and format that are solved
_CHECKED = 4 * 512                  # tokens that a run's result is checked with, where the text has them left over
_UNWEIGHED = "no loss could be taken of the model's output: all layers' errors count the same in the choice of presets"
_UNCOUNTED = {"token_weights": "time and memory for weighing the tokens, which takes the whole model at once, are not counted",
              "distill": "time and memory for learning the codebooks and norms of each block are not counted"}


@dataclass
class Plan:
    """What a run with these arguments gives and takes; bytes and seconds.

    `packed_bytes` and `bits_per_value` are exact (linears that the first sample does not call count as dense), `other_bytes` those of all
    other tensors, `journal_bytes` what the journal takes beside the checkpoint, at most and while the run lasts.
    `seconds` by stage (but the check at the end), `cpu_seconds` (of all threads together, which other programs disturb less), `peak_ram`
    and `peak_gpu` are predictions from `probe`, the block that was tried and on how many samples.  For a target: `errors`
    {layer: {preset: relative error by a short recipe}}, and `shares` {layer: what an error of 1 adds to the loss per token, in nats}.
    """

    model: str
    config: VQConfig
    specs: dict[str, QuantSpec]
    packed_bytes: int
    dense_bytes: int
    other_bytes: int
    journal_bytes: int
    seconds: dict[str, float]
    cpu_seconds: float
    peak_ram: int
    peak_gpu: int
    probe: dict[str, Any]
    errors: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    shares: dict[str, float] = dataclasses.field(default_factory=dict)
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


@torch.inference_mode(False)       # as quantize
@torch.no_grad()
def plan(source: str | os.PathLike | nn.Module, config: VQConfig | str = DEFAULT_PRESET, *, calibration=None, samples: int = 128,
         sequence_length: int = 2048, device=None, dtype="auto", target_bytes: int | None = None, target_bits: float | None = None,
         presets: Sequence[str] = mixed.CANDIDATES, progress: Progress | None = None, tokenizer=None,
         disk: str | os.PathLike | None = None) -> Plan:
    """Predicts the run of `quantize` with the same arguments, by running one block: as many blocks as it has make up its time.

    Like that run it has one block of a folder's model in memory, after reading all of them once.  disk: a folder of the file system
    that the run will write to, where a temporary journal is timed; None is the system's place for temporary files.

    With target_bytes (of all tensors) or target_bits (per quantized weight) every layer gets one of `presets`, so that the target is met
    (a packed head included) and the estimated rise of the loss is least; that needs `calibration`, and `.config` is the outcome.  Without
    it the block is tried on random tokens.  A module's fused experts are unfused.  Raises ConfigError for a target out of reach, NumericalError for non-finite weights.
    """
    from .hf import pick_device

    config, progress = VQConfig.preset(config) if isinstance(config, str) else config, progress or Progress()
    device, began = pick_device(device), _clock()
    targeted = target_bytes is not None or target_bits is not None
    if target_bytes is not None and target_bits is not None:
        raise ConfigError("target_bytes and target_bits: give one of them")
    if targeted and not math.isfinite(target := target_bytes if target_bits is None else target_bits):
        raise ConfigError(f"a target of {target}: need a finite number, like 2.5 bits per weight (target_bits=, --target-bpv)")
    if targeted and calibration is None:
        raise ConfigError("a target needs calibration text, to measure how much each layer suffers")
    with temporary_folder(disk):              # that it can be written shows before any work
        pass
    progress.stage("loading the model")
    stream = open_stream(source, dtype, tokenizer)
    tokens, unused = (random_tokens(stream.model, samples, sequence_length), None) if calibration is None else calibration_windows(
        calibration, stream.tokenizer, samples, sequence_length, config.seed)
    require_usable(stream.model, tokens)
    checked = _CHECKED if calibration is None else 0 if unused is None else unused.numel()
    samples, seconds, opened = len(tokens), {"load": _clock() - began}, _clock(device)
    progress.stage("reading the whole model once")
    with uncalled(stream) as idle:
        stream.survey(tokens[:1], device)
    trim_memory()
    seconds["survey"] = _clock(device) - opened
    surveyed = resident_memory(reset=True)
    head = find_head(stream) if config.head else None
    errors, shares = {}, {}
    if targeted:
        choices = {full: found for full, found in mixed.candidates(config, presets, stream.shapes).items() if full not in idle}
        ends = head.specs(config) if head is not None else {}
        rest = stream.nbytes - sum(stream.weight_bytes[full] for full in (*choices, *ends))
        weights = sum(rows * cols for full, (rows, cols) in stream.shapes.items() if full in choices)
        weights += sum(spec.rows * spec.cols for spec in ends.values())
        budget = target_bytes - rest if target_bits is None else int(target_bits * weights / 8 + 1e-9)
        budget -= sum(spec.nbytes for spec in ends.values())
        mixed.check_budget(choices, budget, rest, list(ends.values()))
        stream.require_finite(choices)
        errors = mixed.sensitivities(stream, tokens[:SENSITIVITY_SAMPLES], choices, device, progress)
        shares = mixed.loss_shares(stream, tokens[:GRADIENT_SAMPLES], choices, device, progress)
        config = mixed.within_budget(config, choices, errors, shares, budget)
        errors = {full: found for full, found in errors.items() if None not in found}
    specs = {full: spec for full, spec in config.resolve(stream.shapes).items() if full not in idle}
    stream.require_finite(specs)
    specs |= head.specs(config) if head is not None else {}

    probe = _Probe(stream, specs, config, tokens[:PROBE_SAMPLES], samples, device, progress)
    share, inside = samples / len(probe.tokens), [spec for name, spec in specs.items() if name in stream.shapes]
    blocks = sum(spec.rows * spec.cols for spec in inside) / sum(spec.rows * spec.cols for spec in probe.specs.values())      # as many of the tried one make up the model
    seconds["load"] = seconds["load"] + probe.seconds["load"] * blocks
    seconds["embed"] = probe.seconds["embed"] * share
    for stage in ("forward", "hessians"):
        seconds[stage] = probe.seconds[stage] * share * blocks
    seconds["solve"] = sum(probe.solve_seconds(spec) for spec in specs.values())
    packed, dense = sum(spec.nbytes for spec in specs.values()), sum(stream.weight_bytes[full] for full in specs)
    in_blocks = sum(specs[name].nbytes - stream.weight_bytes[name] for name in specs if name in stream.shapes) + sum(_nbytes(t) for block in stream.blocks for t in block.module.state_dict().values())
    files_only, state_bytes = states_on_disk(samples, probe.state)
    progress.stage("timing the journal")
    seconds["journal"] = probe.journal_seconds(disk, in_blocks, len(stream.blocks), samples)
    # The check keeps logits of the dense model; at last the whole checkpoint and the comparison join them.
    vocabulary, itemsize = getattr(text_config(stream.model), "vocab_size", None) or 0, next(stream.model.parameters()).element_size()
    logits, whole = checked * vocabulary * itemsize, packed + stream.nbytes - dense if checked else 0
    checking = surveyed.now + logits + divergence_bytes(min(checked, tokens.shape[1]), vocabulary, itemsize)
    checking += (whole if device.type == "cpu" else 0) - (0 if stream.streamed else dense - packed)
    ahead = probe.ahead if reads_ahead(stream, device) and len(stream.blocks) > 1 else (0, 0)
    peak_ram = max(surveyed.peak, logits + probe.peak(False, 0 if files_only else samples) + ahead[0], checking)
    warnings = [text for block in stream.blocks for text in stream.warnings[block.name]]
    warnings += [text for option, text in _UNCOUNTED.items() if getattr(config.recipe, option)] + [_UNWEIGHED] * (targeted and not shares)
    tried = {"block": probe.block.name, "samples": len(probe.tokens), "of_samples": samples, "sequence_length": tokens.shape[1],
             "tokens_sha256": tokens_sha256(tokens), "seconds": float((_clock() - began)[0])}
    return Plan(stream.name, config, specs, packed, dense, stream.nbytes - dense, in_blocks + state_bytes,
                {stage: float(both[0]) for stage, both in seconds.items()}, float(sum(seconds.values())[1]), peak_ram,
                max(probe.peak(True, samples) + ahead[1], whole) if device.type == "cuda" else 0, tried, errors, shares, warnings)


class _Probe:
    """One block run as `quantize` runs it, on a few samples: seconds of each stage (by the clock and of processors), peak memory.

    It is the middle one of the largest.  Of linears alike in shape and format a few are solved, also those that only other blocks have.
    """

    def __init__(self, stream: BlockStream, specs: dict[str, QuantSpec], config: VQConfig, tokens: Tensor, of: int, device: torch.device,
                 progress: Progress):
        """of: samples that the run has."""
        self.tokens, self._device, self._config, self._progress = tokens, device, config, progress
        self.seconds: dict[str, Tensor] = {}
        self._solved: dict[tuple, list[Tensor]] = {}
        inside = {b.name: {full: spec for full, spec in specs.items() if full.startswith(b.name + ".")} for b in stream.blocks}
        size = {name: sum(spec.rows * spec.cols for spec in found.values()) for name, found in inside.items()}
        largest = [block for block in stream.blocks if size[block.name] == max(size.values())]
        self.block = largest[len(largest) // 2]
        self.specs = inside[self.block.name]
        progress.stage(f"trying {self.block.name}")
        self._hidden = self._timed("embed", embed, stream.model, stream.blocks, tokens)
        self.state = _nbytes(self._hidden[0])
        self.resident = not states_on_disk(of, self.state)[0] and states_on_device(of, self.state, device)
        if self.resident:
            self._hidden = [state.to(device) for state in self._hidden]
        for before in stream.blocks[: stream.blocks.index(self.block)]:
            with stream.loaded(before, device):
                self._hidden = [before(state.to(device)).to(state.device) for state in self._hidden]
        self._start = resident_memory(reset=True)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._timed("load", stream.load, self.block)
        with stream.loaded(self.block, device) as found:
            self.block(self._hidden[0].to(device))      # what only a first call does
            self._try({full: found[full] for full in self.specs}, specs)
        self._end = resident_memory()
        self.ahead = locked_bytes(whole := self.block.module.state_dict()), sum(map(_nbytes, whole.values()))     # bytes in RAM, on a GPU
        self.peak_gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0

    def _try(self, linears: dict[str, nn.Module], specs: dict[str, QuantSpec]) -> None:
        block, hidden, device = self.block, self._hidden, self._device
        order, wanted, self._kept, shortcuts = [Stage(tuple(linears))], {}, 2, Shortcuts(block)
        samples = Samples(len(hidden), cuts=_CUTS if len(hidden) == PROBE_SAMPLES else ())
        if self._config.recipe.compensate:
            order = find_stages(block, linears, hidden[0].to(device))
            shortcuts = Shortcuts.find(block, order, linears, hidden, device)
            _, wanted = self._timed("forward", run_dense, block, order, linears, hidden, device)
            self._kept = 3 + sum(wanted[name][0].numel() for name in wanted) / hidden[0].numel()
        for stage in order:
            inputs = self._timed("hessians", collect, stage, {n: linears[n] for n in stage.names}, block, hidden, wanted, device, samples, None, shortcuts)
            for full in stage.names:
                self._solve(full, linears, inputs, specs[full])
        for spec in specs.values():
            if self._key(spec) not in self._solved and (alike := self._alike(spec)) is not None:
                hessian = Hessian(spec.cols, device)
                hessian.add(torch.randn(4 * spec.cols, spec.cols, generator=torch.Generator().manual_seed(0)))
                self._solve(alike, linears, Inputs({alike: hessian}), spec)
        self._timed("forward", lambda: [shortcuts(place, state.to(device)) for place, state in enumerate(hidden)])

    def solve_seconds(self, spec: QuantSpec) -> Tensor:
        """Of one linear in this format: the mean of those solved, or by the number of weights from those in the same format, or in any."""
        if self._key(spec) in self._solved:
            return sum(self._solved[self._key(spec)]) / len(self._solved[self._key(spec)])
        same = {key: s for key, s in self._solved.items() if key[2:4] == (spec.dim, spec.index_bits)} or self._solved
        return spec.rows * spec.cols * sum(map(sum, same.values())) / sum(key[0] * key[1] * len(s) for key, s in same.items())

    def peak(self, on_device: bool, samples: int) -> int:
        """Bytes in RAM or on a GPU, with the hidden states of `samples` in the place of the probe's where those are."""
        more = max(samples - len(self.tokens), 0) * self._kept * self.state
        return int((self.peak_gpu if on_device else self._end.peak) + (more if on_device == self.resident else 0))

    def journal_seconds(self, disk: str | os.PathLike | None, in_blocks: int, blocks: int, samples: int) -> Tensor:
        """Of putting `blocks` of `in_blocks` bytes together, and as often the hidden states of `samples`, into a journal.

        One block with the probe's states is really written, and before it next to nothing, which tells what any block takes.
        """
        streams = ("hidden", "dense") if self._config.recipe.compensate else ("hidden",)
        block = torch.randint(256, (max(in_blocks // blocks, 1),), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        written = len(block) + len(streams) * len(self._hidden) * self.state
        with temporary_folder(disk) as place:
            journal, times = Journal(place, {}), [_clock()]
            try:
                for index, (tensor, states) in enumerate([(block[:1], []), (block, self._hidden)]):
                    journal.commit({"block": index}, {"block": tensor}, dict.fromkeys(streams, states))
                    times.append(_clock())
            finally:
                journal.close()
        least, both = times[1] - times[0], times[2] - times[1]
        return blocks * least + (both - least).clamp_min(0) * (in_blocks + blocks * len(streams) * samples * self.state) / written

    def _solve(self, full: str, linears: dict[str, nn.Module], inputs: Inputs, spec: QuantSpec) -> None:
        solved = self._solved.setdefault(self._key(spec), [])
        if len(solved) < _ALIKE:
            self._progress.stage(f"solving {full}")
            began, recipe = _clock(), self._config.recipe
            weight = inputs.target(full, dense_weight(linears[full]).float(), recipe)
            solve(weight, inputs.hessians[full], spec, recipe, full)
            solved.append(_clock() - began)

    def _alike(self, spec: QuantSpec) -> str | None:
        return next((full for full, own in self.specs.items() if (own.rows, own.cols) == (spec.rows, spec.cols)), None)

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


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
