"""Layers of a finished checkpoint computed anew, on other calibration data or in another format, and all blocks behind them."""
from __future__ import annotations

import fnmatch
import functools
import hashlib
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from . import checkpoint, tensorfile
from .errors import ConfigError, FormatError, ResumeMismatch
from .journal import require_same
from .report import Report
from .solver import LayerRecord
from .spec import QuantSpec
from .storage import digest_of
from .stream import packed_weight
from .weight import VQWeight

WEAK = "weak"
_WEAK_FACTOR = 2        # times the median error of the layers of one kind


@dataclass(frozen=True)
class Redo:
    """The blocks before number `first` are kept as they are in the checkpoint of `folder`, and what is packed in front of them.

    `kept` are the records of these layers.
    """

    folder: Path
    first: int
    kept: dict[str, LayerRecord]
    field: dict             # of the job

    def weight(self, name: str) -> VQWeight:
        """A kept layer's; raises FormatError where it is not what was written."""
        from safetensors import safe_open

        for file in checkpoint.tensor_files(self.folder):
            with safe_open(file, framework="pt") as stored:
                if f"{name}.idx" in stored.keys():
                    vq = packed_weight(self.kept[name], stored.get_tensor)
                    if digest_of(vq.buffers.values()) != self.kept[name].sha256:
                        raise FormatError(f"{file}: {name} is not what was written; copy the checkpoint again")
                    return vq
        raise FormatError(f"{self.folder}: {name} is in none of its files; copy the checkpoint again")

    def restore(self, module: nn.Module, name: str) -> None:
        """Gives the norms and biases of a kept block the values that they have learnt, if they have."""
        if any(record.distilled for full, record in self.kept.items() if full.startswith(name + ".")):
            checkpoint.restore_parameters(module, name, self._files)

    @functools.cached_property
    def _files(self) -> list[Path]:
        """The checkpoint's tensor files, each what was written."""
        hashes = (checkpoint.read_index(self.folder) or {}).get("metadata", {}).get("sha256", {})
        for file in (files := checkpoint.tensor_files(self.folder)):
            if tensorfile.sha256(file) != hashes.get(file.name):
                raise FormatError(f"{file}: not what was written; copy the checkpoint again")
        return files


def plan_redo(folder: Path, patterns: tuple[str, ...], blocks: list[str], front: str | None, specs: dict[str, QuantSpec], job: dict,
              begun: dict | None) -> Redo:
    """What to keep of the checkpoint in `folder`.  `job`: as it would be without redoing; `begun`: the job of an unfinished run there.

    `front`: what is quantized before the blocks, which make up for its errors: the embedding, or the head that is one too.

    Patterns are shell patterns of layers' names, or of what follows their first parts; "weak" stands for the layers whose error
    is over twice the median of those that are called alike.  Raises ConfigError where there is nothing to redo, and ResumeMismatch where
    what is kept would be in another format.
    """
    report = Report.load(folder) if (folder / checkpoint.REPORT).exists() else None
    if begun and begun.get("redo", {}).get("layers") == list(patterns):
        first = begun["redo"]["from"]
        return Redo(folder, first, _before(report, blocks, first), begun["redo"])
    if report is None or not (folder / checkpoint.CONFIG).exists() or begun:
        raise ConfigError(f"{folder}: only layers of a finished checkpoint can be done again; run the same command without --redo first")
    require_same(folder, {key: report.job.get(key) for key in ("model",)}, {"model": job["model"]})
    if report.job == {**job, "redo": report.job["redo"]} and report.job["redo"].get("layers") == list(patterns):
        return Redo(folder, report.job["redo"]["from"], _before(report, blocks, report.job["redo"]["from"]), report.job["redo"])
    wanted = {name for pattern in patterns for name in _matching(pattern, report.layers, specs)}
    missing = [pattern for pattern in patterns if pattern != WEAK and not _matching(pattern, report.layers, specs)]
    if missing:
        raise ConfigError(f"--redo {missing[0]!r} matches no quantized layer; they are called like {report.layers[0].name!r}")
    if not wanted:
        raise ConfigError(f"{folder}: no layer's error is over {_WEAK_FACTOR} times the median of its kind; name layers to redo instead of "
                          f"{WEAK!r}")
    # Of a head alone all blocks are kept, which it is behind; an embedding is the first of all layers.
    first = min((index for index, block in enumerate(blocks) if any(_inside(name, [block]) for name in wanted)), default=len(blocks))
    if {report.layers[0].name, front} & wanted:
        first = 0
    kept = _before(report, blocks, first)
    # Linears of kept blocks that no rule left dense, but that were never called, stay dense.
    before = {name for name in specs if first and (name == front or _inside(name, blocks[:first])
                                                   and (report.config.rule(name) or ("", {}))[1] is None)}
    for name in [*kept, *sorted(before - set(kept))]:
        was, now = kept[name].spec if name in kept else None, specs.get(name)
        if was != now:
            was, now = (spec.to_dict() if spec else "dense" for spec in (was, now))
            block = next((block for block in blocks if _inside(name, [block])), blocks[0])
            raise ResumeMismatch(f"{name}: its format was {was}, is {now}; layers before {[*blocks, 'the head'][first]}, the first to "
                                 f"redo, cannot be changed; leave its format as it was, or redo '{block}.*' as well")
    hashes = hashlib.sha256("".join(record.sha256 for record in kept.values()).encode()).hexdigest()
    # The configuration of the new checkpoint says how the others are solved.
    recipe = report.job.get("config", {}).get("recipe")
    other = {"recipe": recipe} if first and recipe != job["config"]["recipe"] else {}
    return Redo(folder, first, kept, {"layers": list(patterns), "from": first, "kept": hashes, "calibration": _calibration(report, first),
                                      **other})


def _matching(pattern: str, layers: list[LayerRecord], more: Iterable[str] = ()) -> list[str]:
    """Names of `layers`, or `more` that may be quantized now, as a rule had left them dense."""
    if pattern == WEAK:
        kinds: dict[str, list[float]] = {}
        for record in layers:
            kinds.setdefault(record.name.rpartition(".")[2], []).append(record.error)
        return [r.name for r in layers if r.error > _WEAK_FACTOR * statistics.median(kinds[r.name.rpartition(".")[2]])]
    return [name for name in (*(r.name for r in layers), *more)
            if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")]


def _before(report: Report | None, blocks: list[str], first: int) -> dict[str, LayerRecord]:
    """{layer: record} of the blocks before number `first`, and of what is in front of them."""
    layers = report.layers if report and first else []
    front = layers[:1] if layers and not _inside(layers[0].name, blocks) else []
    return {record.name: record for record in [*front, *(record for record in layers if _inside(record.name, blocks[:first]))]}


def _inside(name: str, blocks: list[str]) -> bool:
    return any(name.startswith(block + ".") for block in blocks)


def _calibration(report: Report, first: int) -> dict:
    """What the kept layers were computed on, in the form of a job's field."""
    before = {"before": report.job.get("calibration", {}), **({"redo": report.job["redo"]} if report.job.get("redo") else {})}
    return before if first else {}
