"""One run of quantize(): the folder it works in, the journal it goes on from, its report, and what it does not let pass."""
from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from . import checkpoint, ops, ranks
from .config import VQConfig
from .errors import ConfigError, FormatError, GptvqError
from .journal import FOLDER, Follower, Journal, discard, require_same, stored_job
from .machine import device_class, versions
from .model import Block
from .redo import Redo, plan_redo
from .report import Progress, Report, record_of
from .solver import LayerRecord
from .spec import LAYOUT_VERSION, QuantSpec
from .stream import BlockStream, packed_weight
from .weight import VQWeight

RESUME = ("auto", "fresh", "never")


class Run:
    """What a run is told and where it stands.

    `report` is filled in as blocks are done; `journal` is None where none is kept, `redo` unless layers of a finished
    checkpoint are done again.
    """

    def __init__(self, config: VQConfig, device: torch.device, resume: str, redo: tuple[str, ...], strict: bool, overwrite: bool,
                 progress: Progress):
        if resume not in RESUME:
            raise ConfigError(f"resume: got {resume!r}, need one of {', '.join(RESUME)}")
        if redo and resume == "never":
            raise ConfigError("redo keeps what is done in a journal: leave resume at \"auto\" (no --no-journal)")
        self.config, self.device, self.resume, self.patterns, self.strict, self.overwrite, self.progress = (
            config, device, resume, redo, strict, overwrite, progress)
        self.began = self._counted = time.perf_counter()
        self.folder: Path | None = None
        self.journal: Journal | None = None
        self.redo: Redo | None = None
        self.report: Report | None = None
        self._front: str | None = None
        self._kept_front: tuple[LayerRecord, VQWeight] | None = None
        self._noted, self._staged = 0, {}

    # ---- the folder
    def claim(self, out: str | os.PathLike | None, source) -> Path | None:
        """Proves that the folder may be used, before any work; None is none."""
        if out is None:
            if self.patterns:
                raise ConfigError("redo: got out=None, need the folder of the finished checkpoint whose layers to do again")
            return None
        folder = self.folder = Path(out)
        if ranks.rank():
            return folder
        self.folder = None                                      # not ours until it is proven
        begun, finished = stored_job(folder), self._finished(folder)
        ours = self.resume != "never" and ((folder / FOLDER).is_dir() or finished is not None)
        stored = begun or (finished.job if finished else None)
        if stored and self.resume == "auto" and not self.overwrite and not self.patterns:
            known = self._known()
            require_same(folder, {key: stored.get(key) for key in known}, known)
        if self.patterns and not ours:
            raise ConfigError(f"{folder}: only layers of a finished checkpoint can be done again, and "
                              + ("this one is not as quantizing left it (tuned, or written by another version); quantize again"
                                 if _is_packed(folder) else "there is none"))
        self.folder = checkpoint.prepare(out, self.overwrite or ours, source)
        return self.folder

    def open_report(self) -> Report:
        """An empty one, but for what is known to go badly before any work."""
        self.report = Report("", self.config)
        if text := ops.not_compiled(self.device):
            self.note(text)
        return self.report

    def begin(self, stream: BlockStream, specs: dict[str, QuantSpec], report: Report, front: str | None) -> bool:
        """Opens the journal -> whether the checkpoint is complete already.  front: the layer that is quantized before the blocks.

        Rank 0 does, and the others follow.  Raises ResumeMismatch where the folder holds another job.
        """
        self.report, self._front = report, front
        report.job = self._job(stream, report.calibration)
        for block in stream.blocks:
            for text in stream.warnings[block.name]:
                self.note(text)
        if self.folder is None:
            return False
        complete = bool(ranks.agree(torch.tensor([not ranks.rank() and self._open(stream, specs)], dtype=torch.int64)))
        if ranks.rank():
            if complete:
                self.report = Report.load(self.folder)
                self.report.tokenizer = stream.tokenizer
            elif self.resume != "never":
                self.journal = Follower(self.folder)
                self._plan_redo(stream, specs, self.journal.job)
        ranks.wait()                                            # lest a block be added while somebody is still reading
        return complete

    def _open(self, stream: BlockStream, specs: dict[str, QuantSpec]) -> bool:
        report = self.report
        begun = stored_job(self.folder) if self.resume != "fresh" else None
        finished = self._finished(self.folder) if begun is None else None
        self._plan_redo(stream, specs, begun)
        if finished is not None and self.resume == "auto" and not self.overwrite:
            if not self.patterns:
                require_same(self.folder, finished.job, report.job)
            if finished.job == report.job:
                if (self.folder / FOLDER).is_dir():
                    discard(self.folder)
                self.progress.stage(f"{self.folder} is complete, this job has been done: nothing to do (--fresh starts over)")
                self.report, finished.tokenizer = finished, stream.tokenizer
                return True
        if self.resume == "never":
            if (self.folder / FOLDER).is_dir():
                discard(self.folder)
            return False
        other = self.overwrite and begun is not None and begun != report.job
        self.journal = Journal(self.folder, report.job, fresh=self.resume == "fresh" or other)
        return False

    def _plan_redo(self, stream: BlockStream, specs: dict[str, QuantSpec], begun: dict | None) -> None:
        if self.patterns:
            self.redo = plan_redo(self.folder, self.patterns, [b.name for b in stream.blocks], self._front, specs, self.report.job,
                                  begun)
            self.report.job["redo"] = self.redo.field
            names = [*(block.name for block in stream.blocks), "the head"]
            self.report.redone = {**self.redo.field, "from": names[self.redo.first]}

    def take_over(self, stream: BlockStream) -> None:
        """Puts the blocks in the journal in the place of the dense ones, and what is noted of them into the report."""
        self._noted = len(self.report.warnings)                 # those so far every run finds anew
        if self.done:
            self.progress.stage(f"{self.folder}: {self.done} of {len(stream.blocks)} blocks of this job are done, going on behind them")
            for line in self.journal.blocks:
                self._take_over(line, stream)

    @property
    def done(self) -> int:
        """Number of blocks that an earlier run has finished."""
        return len(self.journal.blocks) if self.journal else 0

    def kept(self, index: int, names) -> dict[str, LayerRecord] | None:
        """{layer: record} of those of `names` that a redo leaves as they are; None for a block that is to be done."""
        if self.redo is None or index >= self.redo.first:
            return None
        return {name: self.redo.kept[name] for name in names if name in self.redo.kept}

    def keeps(self, name: str) -> bool:
        """Whether a redo leaves the layer as it is."""
        return self.redo is not None and (name in self.redo.kept or name == self._front and self.redo.first > 0)

    def kept_front(self) -> VQWeight | None:
        """The weight of what is quantized before the blocks, if a redo keeps it; its record is put into the report.

        From the first block on it is in the journal, as the checkpoint that holds it goes while the new one is written.  Raises
        FormatError where it is in neither.
        """
        if not self.keeps(self._front):
            return None
        if self.done and "front" in self.journal.blocks[0]:
            record = record_of(self.journal.blocks[0]["front"])
            with safe_open(self.journal.path("block", 0), framework="pt") as stored:
                self._kept_front = record, packed_weight(record, stored.get_tensor)
        elif self._front in self.redo.kept:
            self._kept_front = self.redo.kept[self._front], self.redo.weight(self._front)
        else:
            raise FormatError(f"{self.folder}: the weight of {self._front}, which this run keeps, is gone; start over (--fresh, "
                              "resume=\"fresh\")")
        self.report.layers.insert(0, self._kept_front[0])
        return self._kept_front[1]

    def commit(self, index: int, block: Block, streams: dict[str, list[Tensor]]) -> None:
        """Puts a finished block and the hidden states behind it into the journal."""
        now, report = time.perf_counter(), self.report
        line = {"block": index, "name": block.name, "warnings": report.warnings[self._noted:], "seconds": now - self._counted,
                "layers": [r.to_dict() for r in report.layers if r.name.startswith(block.name + ".")],
                "stages": {stage: value - self._staged.get(stage, 0.0) for stage, value in report.stages.items()}}
        tensors = block.module.state_dict(prefix=block.name + ".")
        if index == 0 and self._kept_front:
            record, weight = self._kept_front
            line["front"], tensors = record.to_dict(), {**tensors, **{f"{record.name}.{b}": t for b, t in weight.buffers.items()}}
        self.journal.commit(line, tensors, streams)
        self._counted, self._noted, self._staged = now, len(report.warnings), dict(report.stages)

    def finish(self, stream: BlockStream) -> None:
        """Writes the checkpoint; the journal is needed no more."""
        self.report.seconds += time.perf_counter() - self.began
        if self.folder is None:
            return
        self.progress.stage("writing the checkpoint")
        if not ranks.rank():
            checkpoint.save(stream.model, stream.tokenizer, self.folder, self.report, self._stored(stream))
        if self.journal is not None:
            self.journal.remove()
            self.journal = None
        ranks.wait()

    def give_up(self) -> None:
        """After an error: a journal without a finished block is of no use."""
        if self.journal is not None:
            with contextlib.suppress(GptvqError):
                self.journal.remove() if not self.journal.blocks else self.journal.close()

    # ---- what may not go unnoticed
    def note(self, text: str) -> None:
        """A warning of the report; raises GptvqError under `strict`."""
        self.fallback(text)
        self.report.warnings.append(text)

    def fallback(self, text: str) -> None:
        """Something that the report shows elsewhere; raises GptvqError under `strict`."""
        if self.strict:
            raise GptvqError(f"{text} (an error because of strict, --strict)")

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        began, stages = time.perf_counter(), self.report.stages
        try:
            yield
        finally:
            stages[stage] = stages.get(stage, 0.0) + time.perf_counter() - began

    # ---- pieces
    def _known(self) -> dict:
        """The fields of the job that need no model."""
        return {"config": json.loads(json.dumps(self.config.to_dict())), "device": device_class(self.device), "layout": LAYOUT_VERSION,
                "chunks": ranks.CHUNKS, "versions": versions()}

    def _job(self, stream: BlockStream, calibration: dict) -> dict:
        settings = stream.model.config.to_diff_dict() if hasattr(stream.model, "config") else {}
        for volatile in ("transformers_version", "_name_or_path", "dtype", "architectures"):
            settings.pop(volatile, None)
        return {"model": {"class": type(stream.model).__name__, "config": _sha256(settings), "weights": _sha256(stream.weights_sha256)},
                **self._known(), "calibration": {key: calibration[key] for key in ("samples", "sequence_length", "sha256")}, "redo": {}}

    def _finished(self, folder: Path) -> Report | None:
        """The report of a finished checkpoint of a job that can be compared; of one that is replaced, an empty one if it is damaged."""
        if self.resume == "never" or not (folder / checkpoint.CONFIG).is_file() or not (folder / checkpoint.REPORT).is_file():
            return None
        try:
            report = None if checkpoint.is_resaved(folder) else Report.load(folder)
        except FormatError:
            if not (self.resume == "fresh" or self.overwrite):
                raise
            report = None
        if report is None:
            return Report("", self.config) if (self.resume == "fresh" or self.overwrite) and _is_packed(folder) else None
        return report if report.job else None

    def _take_over(self, line: dict, stream: BlockStream) -> None:
        records = [record_of(values) for values in line["layers"]]
        with safe_open(self.journal.path("block", line["block"]), framework="pt") as stored:
            read = stored.get_tensor if not stream.streamed else lambda name: torch.empty_like(stored.get_tensor(name), device="meta")
            stream.install({record.name: packed_weight(record, read) for record in records})
            if not stream.streamed and any(record.distilled for record in records):
                checkpoint.restore_parameters(stream.model.get_submodule(line["name"]), line["name"], [self.journal.path("block", line["block"])])
        self.report.layers += records
        self.report.seconds += line["seconds"]
        for stage, seconds in line["stages"].items():
            self.report.stages[stage] = self.report.stages.get(stage, 0.0) + seconds
        for text in line["warnings"]:
            self.note(text)
        for record in records:
            if record.repair:
                self.fallback(f"{record.name}: {record.repair}")
        self._noted, self._staged = len(self.report.warnings), dict(self.report.stages)

    def _stored(self, stream: BlockStream):
        """Reads a tensor of a streamed block from the journal."""
        files = {block.name: self.journal.path("block", index) for index, block in enumerate(stream.blocks)} if self.journal else {}

        def read(name: str) -> Tensor:
            file = next(file for block, file in files.items() if name.startswith(block + "."))
            with safe_open(file, framework="pt") as stored:
                return stored.get_tensor(name)

        return read


def _is_packed(folder: Path) -> bool:
    with contextlib.suppress(FormatError):
        return checkpoint.is_packed(folder)
    return False


def _sha256(values: dict) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()
