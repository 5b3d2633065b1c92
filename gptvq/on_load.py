"""What `from_pretrained` is asked for beside a packed checkpoint: to quantize a dense one, and where the modules go."""
from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import transformers
from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from . import checkpoint
from .config import DEFAULT_PRESET, VQConfig
from .errors import ConfigError
from .report import Progress, Report, RichProgress


class GptvqConfig(QuantizationConfigMixin):
    """For `AutoModelForCausalLM.from_pretrained(dense, quantization_config=GptvqConfig(...))`: quantizes while it loads.

    The arguments are those of `gptvq.quantize`, and the weights are the same, byte by byte.  `config`: a VQConfig or a preset's name.
    `calibration`: text, a path, a dataset's name, strings, or ids [samples, tokens]; there is no default.  The checkpoint's files are
    read block by block, the dense model is at no time in memory; the packed one is written into `out`, or else into a temporary
    folder (of the size that `gptvq plan` says), and loaded from there.  With `out` an interrupted load goes on where it was, and a
    finished one quantizes nothing.  `tokenizer`: where the checkpoint has none.  `progress`: None shows it on a terminal.  Afterwards
    `report` holds the Report.
    Raises ConfigError for a config or calibration of the wrong kind.
    """

    def __init__(self, config: VQConfig | str = DEFAULT_PRESET, *, calibration=None, samples: int = 128, sequence_length: int = 2048,
                 device=None, tokenizer=None, out: str | os.PathLike | None = None, strict: bool = False, progress: Progress | None = None):
        if calibration is None:
            raise ConfigError("GptvqConfig: calibration: got None, need text to minimise the error on: calibration=\"calibration.txt\", "
                              "the text itself, a dataset's name, or token ids [samples, tokens]")
        if not isinstance(config, (str, VQConfig)):
            raise ConfigError(f"GptvqConfig: config: got {type(config).__name__}, need a VQConfig or a preset's name")
        self.quant_method = checkpoint.METHOD
        self.config = VQConfig.preset(config) if isinstance(config, str) else config
        self.calibration, self.samples, self.sequence_length = calibration, samples, sequence_length
        self.device, self.tokenizer, self.out, self.strict, self.progress = device, tokenizer, out, strict, progress
        self.report: Report | None = None

    def to_dict(self) -> dict:
        """What of it is JSON."""
        return {"quant_method": self.quant_method, "config": self.config.to_dict(), "samples": self.samples,
                "sequence_length": self.sequence_length}

    def __deepcopy__(self, memo):
        return self                         # transformers copies it on its way to the quantizer; the caller's own shall hold the report


class Dense:
    """A dense checkpoint about to be loaded into `model`: its files, and what becomes of them.

    Raises ConfigError for a model or a source that cannot be quantized on load.
    """

    def __init__(self, model: nn.Module, files: list[str] | None, wish):
        if not isinstance(wish, GptvqConfig):
            raise ConfigError(f"{model.name_or_path}: a dense checkpoint; quantization_config: got {type(wish).__name__}, need "
                              "gptvq.GptvqConfig(preset, calibration=...)")
        if not files:
            raise ConfigError("quantization_config: there are no files to quantize; load from a folder or a hub id, without state_dict=")
        causal = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), ())
        if not isinstance(model, causal):
            raise ConfigError(f"{model.name_or_path}: {type(model).__name__} cannot be quantized on load, only causal language models can; "
                              "use AutoModelForCausalLM, or load it dense")
        self.files, self.model, self._wish, self._temporary = files, model, wish, None

    def quantize(self) -> dict:
        """Quantizes the files, of which the list then names the packed ones -> their quantization_config."""
        from rich.console import Console

        from .quantize import quantize

        wish, folder = self._wish, Path(self.files[0]).parent
        if wish.out is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="gptvq-", ignore_cleanup_errors=True)
        out = Path(self._temporary.name if wish.out is None else wish.out)
        progress = wish.progress or (RichProgress(Console(stderr=True)) if sys.stderr and sys.stderr.isatty() else Progress())
        try:
            wish.report = quantize(folder, out, wish.config, calibration=wish.calibration, samples=wish.samples,
                                   sequence_length=wish.sequence_length, device=wish.device, dtype=str(self.model.dtype)[6:], check=None,
                                   strict=wish.strict, tokenizer=wish.tokenizer or self._tokenizer(folder), progress=progress)
        except BaseException:
            self.clean_up()
            raise
        finally:
            progress.close()
        self.files[:] = map(str, checkpoint.tensor_files(out))
        return checkpoint.read_json(out / checkpoint.CONFIG)["quantization_config"]

    def clean_up(self) -> None:
        """Removes the temporary folder; what was read from it stays."""
        if self._temporary is not None:
            self._temporary.cleanup()

    def _tokenizer(self, folder: Path):
        from .hf import read_tokenizer

        found, name = read_tokenizer(folder), self.model.name_or_path
        if found is None and not Path(name).exists():       # of a hub's model transformers has only fetched the weights so far
            found = read_tokenizer(name, revision=folder.name)
        return found


def refuse_unknown(device_map, model: nn.Module) -> None:
    """Raises ConfigError for an explicit device map with a name that the model does not have."""
    if isinstance(device_map, Mapping):
        names = {"", *dict(model.named_modules()), *model.state_dict()}
        if unknown := [name for name in device_map if name not in names]:
            raise ConfigError(f"device_map: {type(model).__name__} has no module {unknown[0]!r}; its parts are named like "
                              f"{', '.join(repr(name) for name in list(dict(model.named_modules()))[1:4])}")


def refuse_offloading(device_map, settings) -> None:
    """Raises ConfigError where the map leaves packed layers on the disk or nowhere (meta), or on the CPU beside another device.

    Their tensors are buffers, which accelerate does not move to the device that computes.
    """
    if not isinstance(device_map, Mapping):
        return
    places = {name: str(place) for name, place in device_map.items()}
    away = {"disk", "meta"} if set(places.values()) <= {"cpu", "disk", "meta"} else {"cpu", "disk", "meta"}
    layers = getattr(settings, "layers", None)              # not known yet where they are to be quantized
    for name, place in places.items():
        held = layers is None or any(f"{layer}.".startswith(f"{name}.") for layer in layers) or not name
        if place in away and held:
            raise ConfigError(f"device_map: {name or 'the model'!r} goes to {place!r}, but packed layers cannot be offloaded: they are "
                              "small, give them the device that computes (device_map={\"\": \"cuda\"} or \"cpu\"), or raise max_memory")
