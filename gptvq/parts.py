"""transformers: a model in parts, its decoder blocks read from the safetensors files one at a time.

Every part comes from `from_pretrained` itself, so names, conversions, dtypes and ties are what they are for the whole model;
a quantizer of our own, which sees the model on the meta device before anything is read, takes away what is not wanted.
"""
from __future__ import annotations

import os
import warnings
from pathlib import Path

import transformers
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from .checkpoint import CONFIG, INDEX, WHOLE, refuse_missing, tensor_files
from .errors import ConfigError
from .hf import from_pretrained, read_dtype

METHOD = "gptvq-parts"


class Absent(nn.Identity):
    """Stands for a part that is not wanted."""


class PartConfig(QuantizationConfigMixin):
    """What to read: one decoder block by its name, or all but the blocks (None)."""

    def __init__(self, block: str | None = None):
        self.quant_method, self.block = METHOD, block


class PartReader(HfQuantizer):
    """Leaves of a model on the meta device the wanted part; `list_name` and `blocks` are those of the largest list of modules."""

    list_name, blocks = "", ()

    def _process_model_before_weight_loading(self, model, **kwargs):
        model._keys_to_ignore_on_load_unexpected = {""}      # all of them: the tensors of the other parts
        if self.quantization_config.block is None:
            self.list_name = largest_list(model)
            members = model.get_submodule(self.list_name)
            self.blocks = list(members)
            for index in range(len(members)):
                members[index] = Absent()
        else:
            model.all_tied_weights_keys = {}
            _keep(model, self.quantization_config.block.split("."))

    def is_serializable(self):
        return False

    @property
    def is_trainable(self):
        return False


def streamable(source: str | os.PathLike) -> Path | None:
    """The local folder with the safetensors files of a dense model (of a hub id: where they were downloaded), else None."""
    path = Path(source)
    if path.exists():
        folder = path if path.is_dir() else None
    elif str(source).startswith((".", "/", "~")) or str(source).count("/") > 1 or path.suffix == ".gguf":
        return None                                         # a missing folder or file, which open_dense refuses
    else:
        folder = _downloaded(str(source))
    if folder is None or not (folder / CONFIG).is_file() or not any((folder / file).is_file() for file in (WHOLE, INDEX)):
        return None
    settings, _ = transformers.PreTrainedConfig.get_config_dict(folder)
    return None if "quantization_config" in settings else folder


def open_skeleton(folder: Path, dtype: str) -> tuple[nn.Module, str, list[nn.Module]] | None:
    """(model in eval mode, name of its list of blocks, the blocks): the blocks on the meta device, all else read.

    None, with a warning, for a model whose own code reaches into its blocks while it is read.
    """
    try:
        model = _read(folder, dtype, None)
    except ConfigError as error:
        if f"{Absent.__name__!r} object" not in str(error):
            raise
        warnings.warn(f"{folder}: its code does not let it be read in parts; it is in memory as a whole, all blocks at once", stacklevel=2)
        return None
    reader = model.hf_quantizer
    members = model.get_submodule(reader.list_name)
    for index, block in enumerate(reader.blocks):
        members[index] = block.eval()
    del model.hf_quantizer, model.config.quantization_config
    model.__dict__.pop("quantization_method", None)
    model.is_quantized = False
    return model.eval(), reader.list_name, list(reader.blocks)


def read_block(folder: Path, dtype: str, name: str) -> nn.Module:
    """The decoder block `name` in eval mode, with its weights and nothing else of the model."""
    return _read(folder, dtype, name).get_submodule(name).eval()


def largest_list(model: nn.Module) -> str:
    """Name of the outermost nn.ModuleList with most parameters; raises ConfigError where there is none."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)}
    outer = [name for name in lists if not any(name.startswith(other + ".") for other in lists)]
    if not outer:
        raise ConfigError(f"{type(model).__name__}: no list of decoder blocks; need a decoder-only language model")
    return max(outer, key=lambda name: sum(p.numel() for p in lists[name].parameters()))


def _read(folder: Path, dtype: str, block: str | None) -> nn.Module:
    model, found = from_pretrained(folder, ConfigError, dtype=read_dtype(dtype), quantization_config=PartConfig(block),
                                   local_files_only=True, output_loading_info=True)
    refuse_missing(found["missing_keys"], folder)
    for part in model.modules():
        if isinstance(part, transformers.PreTrainedModel):      # some compute in another way where they find it
            part.config.__dict__.pop("_is_quantized", None)
    return model


def _keep(module: nn.Module, path: list[str]) -> None:
    """Takes away all children that are not on the way to `path`."""
    for name in list(module._modules):
        if name != path[0]:
            module._modules[name] = Absent()
    if len(path) > 1:
        _keep(module._modules[path[0]], path[1:])


def _downloaded(name: str) -> Path | None:
    """The folder of a hub model's files, all fetched; None where it has no safetensors or cannot be reached."""
    try:
        folder = Path(cached_file(name, CONFIG)).parent
        if cached_file(name, WHOLE, _raise_exceptions_for_missing_entries=False) is None:
            for file in tensor_files(Path(cached_file(name, INDEX)).parent):
                cached_file(name, file.name)
        return folder
    except Exception:       # whatever the network or the hub raises: open_dense meets it again and names it
        return None


AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, PartConfig)
AUTO_QUANTIZER_MAPPING.setdefault(METHOD, PartReader)
