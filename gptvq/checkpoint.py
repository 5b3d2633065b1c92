"""Packed checkpoints on disk: safetensors shards, their index, and config.json written last, so that its presence means complete."""
from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

from . import tensorfile
from .errors import ConfigError, FormatError, GptvqError
from .spec import LAYOUT_VERSION, QuantSpec
from .tensorfile import Entry, shorten

if TYPE_CHECKING:
    from torch import Tensor, nn

VERSION = "0.1.0"           # of the package, noted in every checkpoint
METHOD = "gptvq"
CONFIG, WHOLE, INDEX, REPORT = "config.json", "model.safetensors", "model.safetensors.index.json", "report.json"
TIMES = "times.json"
SHARD_BYTES = 5 * 10**9
ANY_FLOAT = "a float"
#: In the metadata of tensor files that transformers writes, for which there are neither hashes nor a report.
RESAVED = {"written_by": "save_pretrained"}
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors")
_VARIANT = re.compile(r"model\.([^.]+?)(-\d{5}-of-\d{5})?\.safetensors")
#: What a quantization_config holds beside quant_method, layout_version and layers.
SETTINGS = {"version": (str,), "config": (dict, type(None)), "bits_per_value": (int, float), "calibration": (dict, type(None)),
             "experts": (list, type(None)), "tied": (dict, type(None))}


# ---- writing
def prepare(out: str | os.PathLike, overwrite: bool, source=None) -> Path:
    """Makes the folder and proves that it can be written; raises ConfigError for one that is in use, unless `overwrite`."""
    folder = Path(out)
    if isinstance(source, (str, os.PathLike)) and Path(source).exists() and folder.exists() and folder.samefile(source):
        raise ConfigError(f"{folder}: the output folder is the model's own folder; name another")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: the output must be a folder, this is a file; name another")
    probe = folder / ".gptvq-partial"
    try:
        if folder.exists() and any(path != probe for path in folder.iterdir()) and not overwrite:
            raise ConfigError(f"{folder}: the output folder is not empty; name another, or allow overwriting (overwrite=True, --overwrite)")
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror or error}); name a writable folder") from error
    return folder


def require_space(folder: Path, need: int) -> None:
    """Raises ConfigError unless the file system has `need` bytes left."""
    free = shutil.disk_usage(folder).free
    if free < need:
        raise ConfigError(f"{folder}: {free / 1e6:.0f} MB free, the checkpoint needs {need / 1e6:.0f} MB; free some space or name another folder")


def save(model: nn.Module, tokenizer, folder: Path, report=None, stored: Callable[[str], Tensor] | None = None) -> None:
    """Writes a model whose config holds the quantization settings; on any failure what was written is removed again.

    Tensors keep their dtypes; of tied ones the first is stored; `stored` gives those that the model has on the meta device.
    An earlier checkpoint stays until all tensors are on the disk.  Raises ConfigError where the disk is full or fails.
    """
    from .journal import FOLDER
    from .storage import PARTIAL, sync_folder, unlink, write_text

    kept = {path for path in folder.iterdir() if path.suffix != PARTIAL}
    stale = [folder / CONFIG, folder / INDEX, folder / REPORT, folder / TIMES, *folder.glob("*.safetensors")]
    try:
        unlink(folder.glob("*" + PARTIAL))
        with _written_shards(unique_tensors(model), folder, stored) as (files, index):
            kept -= set(stale)
            unlink(stale)       # config.json first: from here on nothing looks complete
            for file in files:
                file.seal()
        write_text(folder / INDEX, json.dumps(index, indent=1) + "\n")
        if getattr(model, "generation_config", None) is not None:
            write_text(folder / "generation_config.json", model.generation_config.to_json_string(use_diff=True))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if report is not None:
            report.save(folder)
        model.config.architectures = [type(model).__name__]
        model.config.dtype = str(model.dtype)[6:]
        sync_folder(folder)
        write_text(folder / CONFIG, model.config.to_json_string(use_diff=True))
        sync_folder(folder)
    except BaseException as error:
        for path in sorted(set(folder.iterdir()) - kept, key=lambda path: path.name != CONFIG):
            with contextlib.suppress(OSError):      # a folder, or a disk that fails altogether
                path.unlink(missing_ok=True)
        if isinstance(error, OSError) or isinstance(error.__cause__, OSError):
            journal = (folder / FOLDER).is_dir()
            rest = ["what the journal holds is"] * journal
            rest += ["the checkpoint that was there is"] * (folder / CONFIG in kept)
            raise ConfigError(f"{folder}: writing the checkpoint failed ({error.__cause__ or error}); none of it was kept"
                              f"{', but ' * bool(rest)}{', and '.join(rest)}. Free some space or make the folder writable, and run "
                              f"the same command again{' (without --fresh, which starts over)' * journal}") from error
        raise


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, of tensors sharing their memory (tied weights) the first only."""
    seen, tensors = set(), {}
    for name, tensor in model.state_dict().items():
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
        if key not in seen or not tensor.numel() or tensor.is_meta:
            tensors[name] = tensor
        seen.add(key)
    return tensors


def restore_parameters(module: nn.Module, name: str, files: list[Path]) -> None:
    """Gives the norms and biases of a block called `name`, all parameters of one dimension, the values that the files have."""
    from safetensors import safe_open

    missing = {full: parameter for full, parameter in module.named_parameters(prefix=name) if parameter.ndim == 1}
    for file in files:
        with safe_open(file, framework="pt") as stored:
            for full in missing.keys() & set(stored.keys()):
                missing.pop(full).data.copy_(stored.get_tensor(full))
    if missing:
        raise FormatError(f"{files[0].parent}: {next(iter(missing))} is in none of its files; copy the checkpoint again")


@contextlib.contextmanager
def _written_shards(tensors: dict[str, Tensor], folder: Path, stored: Callable[[str], Tensor] | None):
    """The tensor files, each written tensor by tensor and synced, which are still to be sealed, and their index."""
    from .storage import TensorFile, by_alignment, layout_of

    shards, size = [{}], 0
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * tensor.element_size()
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += nbytes
    names = [WHOLE] if len(shards) == 1 else [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    with contextlib.ExitStack() as opened:
        files = []
        for file, shard in zip(names, map(by_alignment, shards)):
            files.append(opened.enter_context(TensorFile(folder / file, layout_of(shard), {"format": "pt"})))
            for name, tensor in shard.items():
                files[-1].append(stored(name) if tensor.is_meta else tensor)
            files[-1].sync()
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        yield files, {"metadata": {"total_size": total, "sha256": {file.path.name: file.sha256 for file in files}},
                      "weight_map": {name: file for file, shard in zip(names, shards) for name in shard}}


# ---- reading
def refuse_missing(names: Collection[str], source) -> None:
    """Raises ConfigError where a dense model lacks tensors: transformers fills them with random numbers."""
    if names:
        raise ConfigError(f"{source}: the tensor {min(names)!r} is in none of its files ({len(names)} are missing); copy the model again")


def read_json(path: Path) -> dict:
    """A JSON object of no more bytes than files beside it can account for; raises FormatError naming the file."""
    largest = tensorfile.LEAST_JSON
    if tensorfile.file_size(path) > largest:
        tensors = sum(file.stat().st_size for file in path.parent.glob("*.safetensors") if file.is_file())
        largest = max(largest, tensors // tensorfile.JSON_SHARE)
    return tensorfile.read_json(path, largest)


def is_packed(folder: Path) -> bool:
    """Whether this is a finished checkpoint of ours (of any version)."""
    if not (folder / CONFIG).exists():
        return False
    settings = read_json(folder / CONFIG).get("quantization_config")
    return isinstance(settings, dict) and settings.get("quant_method") == METHOD


def layer_specs(settings: dict, where: str) -> dict[str, QuantSpec]:
    """{layer: spec} of a quantization_config; raises FormatError for a newer layout or damaged settings."""
    version = settings.get("layout_version")
    if type(version) is not int or version < 1:
        raise FormatError(f"{where}: layout_version: got {shorten(version)}, need a positive integer; the file is damaged")
    if version > LAYOUT_VERSION:
        raise FormatError(f"{where}: written in layout version {version} by gptvq {shorten(settings.get('version'))}, this gptvq reads up "
                          f"to version {LAYOUT_VERSION}; upgrade gptvq")
    layers = settings.get("layers")
    if not isinstance(layers, dict) or not layers:
        raise FormatError(f"{where}: layers: got {type(layers).__name__}, need an object with one entry per quantized layer")
    for name, kinds in SETTINGS.items():
        if not isinstance(settings.get(name), kinds):
            raise FormatError(f"{where}: {name}: got {shorten(settings.get(name))}, need {' or '.join(k.__name__ for k in kinds)}; "
                              "the file is damaged")
    if not all(isinstance(name, str) for name in settings.get("experts") or ()):
        raise FormatError(f"{where}: experts: got {shorten(settings['experts'])}, need names; the file is damaged")
    if not all(isinstance(name, str) and isinstance(head, str) and head in layers and name not in layers
               for name, head in (settings.get("tied") or {}).items()):
        raise FormatError(f"{where}: tied: got {shorten(settings['tied'])}, need embeddings and the packed heads they share; the file is "
                          "damaged")
    specs = {}
    for name, values in layers.items():
        try:
            specs[name] = QuantSpec.from_dict(values)
        except (GptvqError, TypeError, AttributeError, ValueError) as error:
            raise FormatError(f"{where}: layers[{shorten(name, 200)}]: {shorten(error, 300)}") from error
    return specs


def read_index(folder: Path) -> dict | None:
    """The index of a checkpoint folder, None without one or where it is out of date.

    `save_pretrained` leaves it where it was when it writes a single file, and transformers reads that file.  Raises FormatError for
    names of files that leave the folder.
    """
    if not (folder / INDEX).exists():
        return None
    index = read_json(folder / INDEX)
    names = index.get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(n, str) for n in names.values()):
        raise FormatError(f"{folder / INDEX}: weight_map: need an object of file names; the file is damaged, copy it again")
    for name in set(names.values()):
        if not _SHARD.fullmatch(name):
            raise FormatError(f"{folder / INDEX}: weight_map names {shorten(name, 200)}, need the plain name of a .safetensors file "
                              "beside it")
    return None if _out_of_date(folder, set(names.values())) else index


def resaved(file: Path) -> bool:
    """Whether transformers wrote a tensor file."""
    return RESAVED.items() <= tensorfile.read_metadata(file).items()


def is_resaved(folder: Path) -> bool:
    """Whether transformers wrote tensor files into the folder, whatever report, index and damaged files lie beside them."""
    for file in folder.glob("*.safetensors"):
        with contextlib.suppress(FormatError):
            if resaved(file):
                return True
    return False


def _out_of_date(folder: Path, named: set[str]) -> bool:
    """Whether there is a whole file, and an index of `named` files from before it was written."""
    if not (folder / WHOLE).exists():
        return False
    if WHOLE in named:
        return resaved(folder / WHOLE)          # then no index was written with it
    return not any((folder / name).exists() for name in named)


def indexed_files(folder: Path, index: dict | None) -> list[Path]:
    """The shards that an index names; without one there is a single file."""
    return [folder / name for name in sorted(set(index["weight_map"].values()))] if index else [folder / WHOLE]


def tensor_files(folder: Path) -> list[Path]:
    """The tensor files of a checkpoint folder; raises FormatError as `read_index`."""
    return indexed_files(folder, read_index(folder))


def are_variant(files: list[Path]) -> bool:
    """Whether these are the files of from_pretrained(variant=...), which have an index of their own."""
    return all(_VARIANT.fullmatch(file.name) and ".." not in file.parts for file in files)


def read_headers(files: list[Path]) -> dict[str, Entry]:
    """{tensor: entry} of all shards; raises FormatError for missing or damaged files and for tensors stored twice."""
    entries: dict[str, Entry] = {}
    for file in files:
        for name, entry in tensorfile.read_header(file).items():
            if name in entries:
                raise FormatError(f"{file}: tensor {shorten(name, 200)} is also in {entries[name].file.name}; quantize again")
            entries[name] = entry
    return entries


def check_tensors(entries: dict[str, Entry], expected: dict[str, tuple[tuple[int, ...], str]], optional: set[str], where: str) -> None:
    """Raises FormatError unless the files hold exactly the expected {tensor: (shape, dtype or ANY_FLOAT)}.

    `optional` tensors (tied ones) may be absent.
    """
    for name, (shape, dtype) in expected.items():
        if name in entries or name not in optional:
            check_tensor(entries, name, shape, dtype, where)
    for name, entry in entries.items():
        if name not in expected:
            raise FormatError(f"{entry.file}: tensor {shorten(name, 200)} belongs to no layer of the model; the file and config.json do "
                              "not fit together")


def check_tensor(entries: dict[str, Entry], name: str, shape: tuple[int, ...], dtype: str, where: str) -> None:
    """Raises FormatError unless the tensor is there in this shape and dtype (or ANY_FLOAT)."""
    entry = entries.get(name)
    if entry is None:
        raise FormatError(f"{where}: tensor {shorten(name, 200)} is missing, need {dtype} {shape}; copy the files again, or quantize again")
    if entry.shape != shape or entry.dtype != dtype and not (dtype == ANY_FLOAT and entry.dtype in tensorfile.FLOATS):
        raise FormatError(f"{entry.file}: tensor {shorten(name, 200)}: got {entry.dtype} {entry.shape}, need {dtype} {shape}; "
                          "copy the file again, or quantize again")
