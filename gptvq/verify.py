"""verify(): a checkpoint folder proven whole, without loading the model; and the structure that every loader checks first."""
from __future__ import annotations

import hashlib
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import checkpoint, tensorfile
from .checkpoint import ANY_FLOAT, CONFIG, INDEX, METHOD, REPORT
from .errors import ConfigError, FormatError
from .spec import QuantSpec
from .tensorfile import Entry, shorten

if TYPE_CHECKING:
    from .report import Report

#: Settings in config.json that are numbers of modules.
_COUNTS = re.compile(r"(n|num)_(\w+_)?(layers?|blocks|experts)")


@dataclass(frozen=True)
class Verified:
    """What `verify` looked at; `hashed` says which hashes were there to compare with."""

    layers: int
    tensors: int
    files: int
    nbytes: int                     # of the tensor files
    hashed: tuple[str, ...]         # "files", "layers"


def verify(path: str | os.PathLike, hashes: bool = True) -> Verified:
    """Checks the structure, the ranges of all values that decoding uses and, unless told not to, the hashes of a checkpoint folder.

    Loads no model; without the hashes it reads little more than the files' headers.  Raises FormatError naming file and
    tensor for whatever is wrong, and ConfigError where there is no such folder.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; need one written by gptvq.quantize")
    found = read_structure(folder)
    for layer, spec in found.specs.items():
        _check_scales(layer, spec, found.entries)
    reported = hashes and (folder / REPORT).exists() and not any(map(checkpoint.resaved, found.files))
    stated = _layer_hashes(folder, found) if reported else {}
    for layer, want in stated.items():
        digest = hashlib.sha256()
        for buffer in found.specs[layer].buffer_shapes():
            digest.update(found.entries[f"{layer}.{buffer}"].read())
        if digest.hexdigest() != want:
            raise FormatError(f"{found.entries[f'{layer}.idx'].file}: layer {layer!r}: the sha256 of its tensors is {digest.hexdigest()}, "
                              f"{REPORT} says {shorten(want, 70)}; copy the files again")
    for file in found.files if hashes and found.sha256 else ():
        digest = tensorfile.sha256(file)
        if digest != found.sha256[file.name]:
            raise FormatError(f"{file}: its sha256 is {digest}, {INDEX} says {shorten(found.sha256[file.name], 70)}; copy the file again")
    return Verified(len(found.specs), len(found.entries), len(found.files), sum(map(tensorfile.file_size, found.files)),
                    ("files",) * bool(hashes and found.sha256) + ("layers",) * bool(stated))


def _check_scales(layer: str, spec: QuantSpec, entries: dict[str, Entry]) -> None:
    import torch

    from .weight import DTYPES, check_values, judged

    shapes = {name: (shape, DTYPES[dtype]) for name, (shape, dtype) in spec.buffer_shapes().items() if name in judged(spec)}
    check_values(spec, {name: torch.frombuffer(bytearray(entries[f"{layer}.{name}"].read()), dtype=dtype).view(shape)
                  for name, (shape, dtype) in shapes.items()}, f"{entries[f'{layer}.gs'].file}: {layer}")


def _layer_hashes(folder: Path, found: Structure) -> dict[str, str]:
    """{layer: sha256} of report.json, which must be about the same layers in the same formats."""
    from .report import Report

    records = {record.name: record for record in Report.load(folder).layers}
    for layer, spec in found.specs.items():
        if layer not in records or records[layer].spec != spec:
            raise FormatError(f"{folder / REPORT}: layer {layer!r}: got {records[layer].spec if layer in records else 'no record'}, "
                              f"{CONFIG} says {spec}; the files do not fit together")
    if len(records) != len(found.specs):
        extra = next(name for name in records if name not in found.specs)
        raise FormatError(f"{folder / REPORT}: layer {shorten(extra, 200)} is not in {CONFIG}; the files do not fit together")
    return {name: record.sha256 for name, record in records.items()}


def own_report(folder: str | os.PathLike) -> Report:
    """The report of a finished checkpoint that quantize() or tune_folder() wrote; no tensor is read.

    Raises ConfigError where the folder is none, or unfinished, or transformers wrote its files, and FormatError for a damaged one.
    """
    from .report import Report

    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; need one written by `gptvq quantize`")
    packed = checkpoint.is_packed(folder)
    if not packed and not (folder / REPORT).exists():
        what = "a model that is not packed" if (folder / CONFIG).exists() else f"a folder without {CONFIG} and {REPORT}"
        raise ConfigError(f"{folder}: got {what}, need a folder written by `gptvq quantize`")
    if packed and (not (folder / REPORT).exists() or checkpoint.is_resaved(folder)):
        read_structure(folder)
        raise ConfigError(f"{folder}: no {REPORT} of its own, as save_pretrained writes none; use the folder that `gptvq quantize` "
                          "wrote, or check this one by `gptvq verify`")
    report = Report.load(folder)
    if not (folder / CONFIG).exists():
        raise ConfigError(f"{folder}: no {CONFIG}, so this checkpoint was never finished; quantize again with --overwrite")
    _layer_hashes(folder, read_structure(folder))
    return report


@dataclass(frozen=True)
class Structure:
    """What a checkpoint folder holds, its files checked against each other; no tensor has been read."""

    config: dict                    # config.json
    specs: dict[str, QuantSpec]     # of every quantized layer
    entries: dict[str, Entry]       # every tensor
    files: list[Path]
    sha256: dict[str, str]          # of the tensor files, as the index states them; empty where it does not


def read_structure(folder: Path) -> Structure:
    """Reads config.json, the index and the headers; raises FormatError naming file and tensor unless all of it fits together."""
    where = folder / CONFIG
    config = checkpoint.read_json(where)
    settings = config.get("quantization_config")
    if not isinstance(settings, dict) or settings.get("quant_method") != METHOD:
        raise FormatError(f"{where}: quantization_config: need an object whose quant_method is {METHOD!r}; not a gptvq checkpoint, "
                          "or damaged")
    if unknown := set(settings) - {"quant_method", "layout_version", "layers", *checkpoint.SETTINGS}:
        raise FormatError(f"{where}: unknown settings {shorten(sorted(unknown), 200)}; config.json is damaged or of a newer gptvq")
    specs, index = checkpoint.layer_specs(settings, str(where)), checkpoint.read_index(folder)
    files = checkpoint.indexed_files(folder, index)
    entries = checkpoint.read_headers(files)
    sha256 = {} if index is None else _check_index(folder / INDEX, index, files, entries)
    for layer, spec in specs.items():
        for buffer, (shape, dtype) in spec.buffer_shapes().items():
            checkpoint.check_tensor(entries, f"{layer}.{buffer}", shape, dtype, str(folder))
    for name, entry in entries.items():
        layer, _, last = name.rpartition(".")
        spec = specs.get(layer)
        if spec is not None and last not in spec.buffer_shapes():
            if last != "bias":
                raise FormatError(f"{entry.file}: tensor {shorten(name, 200)}: the packed layer has no such tensor; quantize again")
            checkpoint.check_tensor(entries, name, (spec.rows,), ANY_FLOAT, str(folder))
    for name in settings.get("tied") or ():
        if own := [entry for entry in entries if entry.startswith(f"{name}.")]:
            raise FormatError(f"{where}: tied: {shorten(name, 200)} has a tensor of its own, {shorten(own[0], 200)}; the file is damaged")
    stated, bits = settings["bits_per_value"], 8 * sum(s.nbytes for s in specs.values()) / sum(s.rows * s.cols for s in specs.values())
    if not 0 < stated < 100 or not math.isclose(stated, bits, rel_tol=1e-6):      # the first for numbers that are no float
        raise FormatError(f"{where}: bits_per_value: got {stated}, the layers' formats make it {bits}; the file is damaged")
    count_blocks(config, entries, str(where))
    return Structure(config, specs, entries, files, sha256)


def _check_index(path: Path, index: dict, files: list[Path], entries: dict[str, Entry]) -> dict[str, str]:
    weight_map, metadata = index["weight_map"], index.get("metadata", {})
    for name, file in weight_map.items():
        if name not in entries or entries[name].file.name != file:
            raise FormatError(f"{path}: tensor {shorten(name, 200)} is not in {file}; the files do not fit together, copy them again")
    if len(weight_map) != len(entries):
        name = next(name for name in entries if name not in weight_map)
        raise FormatError(f"{path}: tensor {shorten(name, 200)} of {entries[name].file.name} is missing; the files do not fit together")
    sha256 = metadata.get("sha256", {}) if isinstance(metadata, dict) else None
    good = isinstance(sha256, dict) and all(isinstance(v, str) for v in sha256.values())
    if not good or sha256 and set(sha256) != {f.name for f in files}:
        raise FormatError(f"{path}: metadata: sha256: need an object with a hash of every tensor file; the file is damaged, copy it again")
    return sha256


def count_blocks(config: dict, entries: dict[str, Entry], where: str) -> None:
    """Raises FormatError where config.json speaks of more blocks or experts than the files can hold: they would be built one by one.

    Some configurations of dense models speak of experts too, which the model then does not build.
    """
    sparse = any("expert" in name for name in entries)
    largest = max((max(entry.shape, default=0) for entry in entries.values() if len(entry.shape) == 3), default=0)
    for part in (config, *(v for k, v in config.items() if k.endswith("_config") and isinstance(v, dict))):
        for key, value in part.items():
            if type(value) is not int or not _COUNTS.fullmatch(key) or "expert" in key and not sparse:
                continue
            if value > len(entries) + (largest if "expert" in key else 0):
                raise FormatError(f"{where}: {key}: got {value}, the files hold {len(entries)} tensors; the file is damaged")
