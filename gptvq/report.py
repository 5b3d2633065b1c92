"""What a quantization run did: one record per linear, totals, warnings, times; beside the checkpoint in two files.

report.json is a matter of the job alone: run again, or interrupted and gone on with, it comes out byte by byte the same.
Seconds and the machine are in times.json.
"""
from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import checkpoint
from .config import VQConfig
from .errors import FormatError, GptvqError
from .machine import environment, peak_memory
from .spec import QuantSpec
from .storage import write_text
from .tensorfile import check_kinds

if TYPE_CHECKING:
    from .solver import LayerRecord

REPORT_VERSION = 1
REPORT_FILE, TIMES_FILE = "report.json", "times.json"


@dataclass
class Report:
    """Outcome of `quantize`: `layers` in model order, byte counts, seconds.

    `dense_bytes` counts the quantized weights as they were before, in the model's dtype; `other_bytes` all tensors that
    were left alone (embeddings, norms, head, biases), a tied one once.  `calibration` holds source, samples,
    sequence_length, tokens and the sha256 of the token ids.  `job` is what decides the bytes of the result; `check` the
    divergence from the dense model after reading back (empty: not measured); `redone` which blocks were computed anew, on
    top of which calibration, and recipe where that is another one (empty: none).
    """

    model_name: str
    config: VQConfig
    layers: list[LayerRecord] = field(default_factory=list)
    calibration: dict[str, Any] = field(default_factory=dict)
    dense_bytes: int = 0
    other_bytes: int = 0
    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)      # stage of the job -> seconds
    warnings: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=environment)
    job: dict[str, Any] = field(default_factory=dict)
    check: dict[str, Any] = field(default_factory=dict)
    redone: dict[str, Any] = field(default_factory=dict)
    tokenizer: Any = field(default=None, repr=False, compare=False)
    folder: Path | None = field(default=None, repr=False, compare=False)
    _model: Any = field(default=None, repr=False, compare=False)

    @property
    def model(self) -> Any:
        """The quantized model, which runs at once; of one that was streamed, what is read back from the folder."""
        if self._model is None and self.folder is not None:
            from .hf import load
            self._model = load(self.folder)
        return self._model

    @model.setter
    def model(self, model: Any) -> None:
        self._model = model

    @property
    def weights(self) -> int:
        """Number of quantized weights."""
        return sum(layer.rows * layer.cols for layer in self.layers)

    @property
    def packed_bytes(self) -> int:
        """Bytes of all packed buffers, what the checkpoint stores for the quantized weights."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def bits_per_value(self) -> float:
        """Stored bits per quantized weight, everything counted; nan for an empty report."""
        return 8 * self.packed_bytes / self.weights if self.weights else math.nan

    @property
    def mean_error(self) -> float:
        """Mean relative layer error, each linear counted once; nan for an empty report."""
        return sum(layer.error for layer in self.layers) / len(self.layers) if self.layers else math.nan

    def to_dict(self) -> dict:
        return {
            "version": REPORT_VERSION, "model": self.model_name, "config": self.config.to_dict(),
            "calibration": dict(self.calibration),
            "totals": {"linears": len(self.layers), "weights": self.weights, "bits_per_value": self.bits_per_value,
                       "packed_bytes": self.packed_bytes, "dense_bytes": self.dense_bytes, "other_bytes": self.other_bytes,
                       "mean_error": self.mean_error, "seconds": self.seconds},
            "layers": [layer.to_dict() for layer in self.layers],
            "warnings": list(self.warnings), "job": dict(self.job), "check": dict(self.check), "redone": dict(self.redone),
            "stages": dict(self.stages), "environment": dict(self.environment),
        }

    def save(self, folder: str | os.PathLike) -> Path:
        """Writes report.json and times.json into an existing `folder`, each all or nothing; report.html, which shows them, goes.

        Numbers that are not finite become null.
        """
        self.environment.setdefault("peak_memory", peak_memory())
        values = finite(self.to_dict())
        times = {"seconds": values["totals"].pop("seconds"), "stages": values.pop("stages"), "environment": values.pop("environment"),
                 "layers": {layer["name"]: layer.pop("seconds") for layer in values["layers"]}}
        for name, content in ((TIMES_FILE, times), (REPORT_FILE, values)):
            write_text(Path(folder) / name, json.dumps(content, indent=1, allow_nan=False) + "\n")
        (Path(folder) / REPORT_FILE).with_suffix(".html").unlink(missing_ok=True)       # of an earlier run
        return Path(folder) / REPORT_FILE

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Report:
        """The report of a checkpoint folder, without its model; raises FormatError where it is missing or damaged."""
        path = Path(folder) / REPORT_FILE
        values = checkpoint.read_json(path)
        version = values.get("version")
        if version != REPORT_VERSION:
            raise FormatError(f"{path}: report version {version!r}, this gptvq reads {REPORT_VERSION}; install a matching gptvq")
        times = path.with_name(TIMES_FILE)
        try:
            times = checkpoint.read_json(times) if times.exists() else {**values, "seconds": values["totals"].get("seconds", 0.0), "layers": {}}
            layers = [record_of({"seconds": times["layers"].get(v["name"], 0.0), **v}) for v in values["layers"]]
            report = cls(values["model"], VQConfig.from_dict(values["config"]), layers, values["calibration"],
                         values["totals"]["dense_bytes"], values["totals"]["other_bytes"], times["seconds"], times.get("stages", {}),
                         values["warnings"], times.get("environment", {}), values.get("job", {}), values.get("check", {}),
                         values.get("redone", {}), folder=Path(folder))
            check_kinds(report)
        except (GptvqError, KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise FormatError(f"{path}: not a report of this version ({type(error).__name__}: {error}); quantize again") from error
        return report


class Progress:
    """Receives what happens during a run and shows nothing.  `close` is called at the end also when a run fails."""

    def start(self, total_weights: int, blocks: int) -> None: ...
    def block(self, index: int, name: str) -> None: ...
    def stage(self, text: str) -> None: ...
    def layer(self, record: LayerRecord) -> None: ...
    def finish(self, report: Report) -> None: ...
    def close(self) -> None: ...

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


class RichProgress(Progress):
    """One printed line per linear and, on a terminal, a live line with the time left; plain lines elsewhere.

    The time left is (weights left) x (seconds so far) / (weights done), counted down between two linears.  Seconds count from the
    first block of which linears are done.
    """

    def __init__(self, console=None):
        from rich.console import Console
        self.console = console or Console()
        self._live = self._status = None
        self._total = self._done = self._blocks = 0
        self._began = self._measured = time.monotonic()
        self._where, self._doing = "", ""

    def start(self, total_weights: int, blocks: int) -> None:
        self.close()
        self._total, self._done, self._blocks = total_weights, 0, blocks
        self._began = self._measured = time.monotonic()
        if self.console.is_terminal:
            from rich.live import Live
            self._live = Live(get_renderable=self._line, console=self.console, refresh_per_second=4, transient=True)
            self._live.start()

    def block(self, index: int, name: str) -> None:
        self._where = f"block {index + 1}/{self._blocks} {name}"
        if not self._done:                  # blocks that a redo keeps were only run
            self._began = self._measured = time.monotonic()
        if self._live is None:
            self._print(str(self._line()))

    def stage(self, text: str) -> None:
        self._doing = text
        if self._live is None and not self._total:
            self._print(text)

    def layer(self, record: LayerRecord) -> None:
        self._done += record.rows * record.cols
        self._measured = time.monotonic()
        self._print(layer_line(record))

    def finish(self, report: Report) -> None:
        self.close()
        self._print(f"{len(report.layers)} linears, {report.weights / 1e6:.1f} M weights: {report.bits_per_value:.3f} bits per value, "
                    f"{size(report.dense_bytes)} -> {size(report.packed_bytes)}, mean error {100 * report.mean_error:.3f} %, "
                    f"{clock(report.seconds)}")
        for warning in report.warnings:
            self._print(f"warning: {warning}")

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def seconds_left(self) -> float:
        """Estimate for the rest of the run; nan before the first linear is done."""
        if not self._done:
            return math.nan
        spent = self._measured - self._began
        return max(0.0, spent / self._done * (self._total - self._done) - (time.monotonic() - self._measured))

    def _line(self):
        from rich.text import Text
        left = self.seconds_left()
        share = self._done / self._total if self._total else 0.0
        eta = "time left unknown" if math.isnan(left) else f"{clock(left)} left"
        if self._live is None:
            return Text(f"{self._where} | {share:.0%} | {eta}")
        # On a narrow terminal the end is cut off.
        return Text(" | ".join(filter(None, (f"{share:.0%}", eta, self._where, self._doing))), no_wrap=True, overflow="ellipsis")

    def _print(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def layer_line(record: LayerRecord) -> str:
    """Name, shape, bits per value, relative error, SNR, seconds and, where one was needed, the repair."""
    shape = f"{record.rows} x {record.cols}"
    return (f"{record.name:<40} {shape:>13}  {record.bits_per_value:5.3f} bpv  {100 * record.error:7.3f} %  "
            f"{record.snr_db:6.2f} dB  {record.seconds:6.1f} s{'  ' + record.repair if record.repair else ''}")


def layer_table(report: Report):
    """The rich table of `gptvq inspect`: one row per linear."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=f"{report.model_name}, quantized by gptvq", box=SIMPLE_HEAD)
    for name in ("linear", "shape", "format", "group", "bytes", "bits/value", "error %", "SNR dB"):
        table.add_column(name, justify="left" if name == "linear" else "right", no_wrap=True)
    for layer in report.layers:
        spec = layer.spec
        table.add_row(layer.name, f"{layer.rows} x {layer.cols}", spec.label, f"{spec.group_rows} x {spec.group_cols}",
                      f"{layer.nbytes:,}", f"{layer.bits_per_value:.3f}", f"{100 * layer.error:.3f}", f"{layer.snr_db:.2f}")
    return table


def size(nbytes: int) -> str:
    """Bytes as "1.5 MB" (decimal units)."""
    value, unit = float(nbytes), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def clock(seconds: float) -> str:
    """Seconds as "m:ss" or "h:mm:ss"."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def finite(value):
    """The same JSON value with null for every float that JSON cannot write."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def record_of(values: dict) -> LayerRecord:
    """The record that `LayerRecord.to_dict` wrote."""
    from .solver import LayerRecord

    known = [f.name for f in dataclasses.fields(LayerRecord) if f.name in values or f.default is dataclasses.MISSING is f.default_factory]
    record = LayerRecord(**{**{name: values[name] for name in known}, "spec": QuantSpec.from_dict(values["spec"])})
    check_kinds(record)
    return record
