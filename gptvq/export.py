"""A packed checkpoint written out as plain safetensors, for tools that know nothing of gptvq."""
from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from . import checkpoint
from .errors import ConfigError, FormatError
from .experts import fused_parameter
from .model import is_conv1d
from .spec import QuantSpec
from .weight import VQWeight

_NOT_COPIED = {checkpoint.CONFIG, checkpoint.INDEX, checkpoint.REPORT, "times.json"}
_COPIED = {".json", ".jinja", ".model", ".txt"}     # tokenizer, chat template, generation settings; no code


def export_dense(folder: str | os.PathLike, out: str | os.PathLike, dtype: str = "auto", overwrite: bool = False,
                 shard_bytes: int = checkpoint.SHARD_BYTES) -> Path:
    """Writes the model of a packed folder into `out` with dense weights; returns its path.

    Shard by shard: no more than one shard and one layer are in memory.  dtype "auto": the checkpoint's own; all else is as stored, tied
    tensors once.  Raises FormatError for a damaged checkpoint, ConfigError for one that is none and where `out` cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    source = Path(folder)
    if not checkpoint.is_packed(source):
        raise ConfigError(f"{source}: not a gptvq checkpoint; need a folder that `gptvq quantize` wrote")
    config = checkpoint.read_json(source / checkpoint.CONFIG)
    settings = config.pop("quantization_config")
    name = dtype if dtype != "auto" else str(config.get("dtype") or config.get("torch_dtype") or "float32")
    if name not in ("float32", "float16", "bfloat16"):
        raise ConfigError(f"dtype: got {name!r}, need auto, float32, float16 or bfloat16")
    plan = tensors(source, settings, getattr(torch, name))
    if settings.get("tied"):
        parts = [part for part in (config, *config.values()) if isinstance(part, dict) and "tie_word_embeddings" in part]
        for part in parts or [config]:
            part["tie_word_embeddings"] = True
    target = checkpoint.prepare(out, overwrite, source)
    checkpoint.require_space(target, sum(nbytes for nbytes, _ in plan.values()))
    if overwrite:
        for path in (target / checkpoint.CONFIG, target / checkpoint.INDEX, *target.glob("*.safetensors")):
            path.unlink(missing_ok=True)
    written = []
    try:
        shards = list(_shards(plan, shard_bytes))
        files = ["model.safetensors"] if len(shards) == 1 else [
            f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        for file, names in zip(files, shards):
            written.append(target / file)
            save_file({each: plan[each][1]().contiguous() for each in names}, target / file, metadata={"format": "pt"})
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(nbytes for nbytes, _ in plan.values())},
                     "weight_map": {each: file for file, names in zip(files, shards) for each in names}}
            (target / checkpoint.INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        for path in source.iterdir():
            if path.is_file() and path.suffix in _COPIED and path.name not in _NOT_COPIED and not path.name.startswith("."):
                shutil.copyfile(path, target / path.name)
        config["dtype"] = name
        (target / checkpoint.CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    except BaseException as error:
        for path in written:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise ConfigError(f"{target}: writing failed ({error}); free some space or name another folder") from error
        raise
    return target


def tensors(folder: Path, settings: dict, dtype: torch.dtype) -> dict[str, tuple[int, Callable[[], Tensor]]]:
    """{name: (bytes, read)} of the dense model in the order of the files, with the names and shapes of transformers' classes."""
    specs = checkpoint.layer_specs(settings, str(folder / checkpoint.CONFIG))
    entries = checkpoint.read_headers(checkpoint.tensor_files(folder))
    packed = {f"{layer}.{buffer}": (tuple(shape), kind) for layer, spec in specs.items()
              for buffer, (shape, kind) in spec.buffer_shapes().items()}
    for name, (shape, kind) in packed.items():
        if name not in entries or (entries[name].shape, entries[name].dtype) != (shape, kind):
            raise FormatError(f"{folder}: tensor {name!r} is missing or not {kind} {shape}; copy the files again, or quantize again")
    modules = dict(_skeleton(folder).named_modules())
    for name in (*specs, *(settings.get("experts") or ())):
        if name not in modules and not any(name.startswith(f"{home}.") for home in settings.get("experts") or ()):
            raise FormatError(f"{folder / checkpoint.CONFIG}: the model that it describes has no {name!r}, which is packed; the file is "
                              "damaged or of another model, copy it again")

    def part(name: str) -> Tensor:
        """A tensor of the model that gptvq's classes make up, in `dtype` where it is packed."""
        layer = name.removesuffix(".weight")
        return _dense(entries, layer, specs[layer], dtype) if layer in specs else _read(entries[name], name)

    plan: dict[str, tuple[int, Callable[[], Tensor]]] = {}
    experts, under = settings.get("experts") or [], {head: name for name, head in (settings.get("tied") or {}).items()}
    for name, entry in entries.items():
        layer, _, leaf = name.rpartition(".")
        home = next((e for e in experts if name.startswith(e + ".")), None)
        if home is not None:
            fused = modules[home]
            for parameter, shape in ((p, t.shape) for p, t in fused.named_parameters() if f"{home}.{p}" not in plan):
                plan[f"{home}.{parameter}"] = shape.numel() * dtype.itemsize, functools.partial(
                    fused_parameter, fused, parameter, dtype, lambda expert, home=home: part(f"{home}.{expert}"))
        elif name not in packed:
            size = getattr(torch, entry.dtype, torch.int64).itemsize        # integers other than bytes: at most that
            plan[name] = math.prod(entry.shape) * size, functools.partial(part, name)
        elif leaf == "idx":
            read = functools.partial(part, f"{layer}.weight")
            turned = is_conv1d(modules[layer])
            size = specs[layer].rows * specs[layer].cols * dtype.itemsize
            plan[f"{under.get(layer, layer)}.weight"] = size, (lambda read=read: read().T) if turned else read
    return plan


def _skeleton(folder: Path):
    """The model's modules on the meta device, without gptvq's.  FormatError where transformers does not know it."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        del config.quantization_config
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config)
    except Exception as error:      # whatever a config class raises: here it all means "cannot be built"
        raise FormatError(f"{folder}: transformers cannot build its model ({type(error).__name__}: {error})") from error


def _dense(entries: dict, layer: str, spec: QuantSpec, dtype: torch.dtype) -> Tensor:
    """[rows, cols] of a packed layer."""
    names = {buffer: f"{layer}.{buffer}" for buffer in spec.buffer_shapes()}
    return VQWeight(spec, {buffer: _read(entries[name], name) for buffer, name in names.items()}).dequantize(dtype)


def _read(entry: checkpoint.Entry, name: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(entry.file, framework="pt") as file:
        return file.get_tensor(name)


def _shards(plan: dict[str, tuple[int, Callable[[], Tensor]]], most: int) -> Iterator[list[str]]:
    """The names, in lots of at most `most` bytes or of one tensor."""
    lot, size = [], 0
    for name, (nbytes, _) in plan.items():
        if lot and size + nbytes > most:
            yield lot
            lot, size = [], 0
        lot.append(name)
        size += nbytes
    yield lot
