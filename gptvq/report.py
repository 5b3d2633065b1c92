"""What a quantization run did: one record per linear, totals, warnings, times; report.json beside the checkpoint."""
from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import VQConfig
from .errors import FormatError, GptvqError
from .spec import QuantSpec

if TYPE_CHECKING:
    from .solver import LayerRecord

REPORT_VERSION = 1
REPORT_FILE = "report.json"


@dataclass
class Report:
    """Outcome of `quantize`: `layers` in model order, byte counts, seconds; `model` runs at once and is not saved.

    `dense_bytes` counts the quantized weights as they were before, in the model's dtype; `other_bytes` all tensors that
    were left alone (embeddings, norms, head, biases), a tied one once.  `calibration` holds source, samples,
    sequence_length, tokens and the sha256 of the token ids.
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
    environment: dict[str, Any] = field(default_factory=lambda: environment())
    model: Any = field(default=None, repr=False, compare=False)
    tokenizer: Any = field(default=None, repr=False, compare=False)

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
            "warnings": list(self.warnings), "stages": dict(self.stages), "environment": dict(self.environment),
        }

    def save(self, folder: str | os.PathLike) -> Path:
        """Writes report.json into an existing `folder`, all or nothing; numbers that are not finite become null, report.html goes."""
        path = Path(folder) / REPORT_FILE
        self.environment.setdefault("peak_memory", peak_memory())
        partial = path.with_suffix(".json.partial")
        text = json.dumps(finite(self.to_dict()), indent=1, allow_nan=False) + "\n"
        try:
            with open(partial, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            path.with_suffix(".html").unlink(missing_ok=True)           # of an earlier run
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise GptvqError(f"{path}: cannot be written ({error.strerror or error}); free some space or choose a writable "
                             "folder") from error
        return path

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Report:
        """The report of a checkpoint folder, without its model; raises FormatError where it is missing or damaged."""
        path = Path(folder) / REPORT_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise FormatError(f"{path}: cannot be read ({error.strerror}); need the folder that `gptvq quantize` wrote") from error
        except ValueError as error:
            raise FormatError(f"{path}: not valid JSON ({error}); quantize again to rewrite it") from error
        version = values.get("version") if isinstance(values, dict) else None
        if version != REPORT_VERSION:
            raise FormatError(f"{path}: report version {version!r}, this gptvq reads {REPORT_VERSION}; install a matching gptvq")
        try:
            return cls(values["model"], VQConfig.from_dict(values["config"]), [_record(v) for v in values["layers"]],
                       values["calibration"], values["totals"]["dense_bytes"], values["totals"]["other_bytes"],
                       values["totals"]["seconds"], values["stages"], values["warnings"], values["environment"])
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{path}: not a report of this version ({type(error).__name__}: {error}); quantize again") from error


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

    The time left is (weights left) x (seconds so far) / (weights done), counted down between two linears.
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
        return Text(f"{self._where} | {self._doing + ' | ' if self._doing and self._live else ''}{share:.0%} | {eta}",
                    no_wrap=True, overflow="ellipsis")

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
        layout = f"{spec.dim}d K{spec.codewords}" + (f" s{spec.scale_block}" if spec.scale_block else "") + (
            f" svd{spec.svd_rank}" if spec.svd_rank else "")
        table.add_row(layer.name, f"{layer.rows} x {layer.cols}", layout, f"{spec.group_rows} x {spec.group_cols}",
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


def peak_memory() -> int:
    """Most bytes of memory that this process has held so far, in RAM; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:                                 # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def environment() -> dict[str, Any]:
    """Processor, cores and versions of what decides the bytes and the speed of a run; JSON ready."""
    import torch

    found = {name: importlib.metadata.version(name) for name in ("gptvq", "torch", "transformers") if _installed(name)}
    return {"machine": platform.machine(), "system": platform.system(), "processor": _processor(), "cores": os.cpu_count(),
            "threads": torch.get_num_threads(), "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
            "python": platform.python_version(), **found}


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _processor() -> str:
    if sys.platform.startswith("linux"):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def finite(value):
    """The same JSON value with null for every float that JSON cannot write."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _record(values: dict) -> LayerRecord:
    from .solver import LayerRecord

    known = [f.name for f in dataclasses.fields(LayerRecord)]       # the file also holds what follows from these
    return LayerRecord(**{**{name: values[name] for name in known}, "spec": QuantSpec.from_dict(values["spec"])})
