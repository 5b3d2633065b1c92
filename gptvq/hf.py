"""transformers: opening dense and packed models, and the quantizer that loads packed checkpoints.

Importing this module registers the format; `import gptvq` arranges for that once transformers is loaded.
"""
from __future__ import annotations

import contextlib
import copy
import os
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from . import checkpoint, large_pages, on_load
from .calibration import read_tokens
from .dense import quicken
from .embedding import VQEmbedding, put_head, scale_of
from .errors import ConfigError, FormatError, GptvqError
from .experts import is_fused, unfuse
from .gguf_file import gguf_file, mend
from .linear import VQLinear, set_activations
from .model import is_conv1d
from .ops import check_activations
from .spec import LAYOUT_VERSION
from .verify import verify

__all__ = ["GptvqQuantizer", "PackedGptvqConfig", "attach", "load", "open_dense", "open_model", "read_tokens"]
DTYPES = ("auto", "bfloat16", "float16", "float32")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")


class PackedGptvqConfig(QuantizationConfigMixin):
    """config.json's quantization_config.  Raises FormatError for a newer layout or damaged settings."""

    def __init__(self, layers: dict | None = None, layout_version: int = LAYOUT_VERSION, version: str = "", config: dict | None = None,
                 bits_per_value: float = 0.0, calibration: dict | None = None, experts: list | None = None, tied: dict | None = None,
                 quant_method=checkpoint.METHOD, **unknown):
        self.quant_method = checkpoint.METHOD
        self.version, self.layout_version = version, layout_version
        self.config, self.layers = config, layers
        self.bits_per_value, self.calibration = bits_per_value, calibration
        self.experts = experts or []        # fused experts that were unfused into linears
        if tied:                            # {embedding: the packed output head whose weight it is}
            self.tied = tied
        self.specs()
        if unknown:
            raise FormatError(f"quantization_config: unknown settings {sorted(unknown)}; config.json is damaged or of a newer gptvq")

    def specs(self):
        return checkpoint.layer_specs(self.__dict__, "quantization_config")


class GptvqQuantizer(HfQuantizer):
    """Puts VQLinears in place on the meta device and checks the files against them before any tensor is read.

    With a GptvqConfig for a dense checkpoint: quantizes it, and goes on with the packed one.
    """

    _dense = None                           # what is to be quantized, until it is

    def validate_environment(self, device_map=None, **kwargs):
        on_load.refuse_offloading(device_map, self.quantization_config)

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, device_map=None, **kwargs):
        on_load.refuse_unknown(device_map, model)
        if self.pre_quantized:
            self._put_in_place(model, checkpoint_files)
        else:
            self._dense = on_load.Dense(model, checkpoint_files, self.quantization_config)

    def _put_in_place(self, model, checkpoint_files):
        files = [Path(file) for file in checkpoint_files or ()]
        entries = checkpoint.read_headers(files)
        if files and not checkpoint.are_variant(files) and sorted(files) != sorted(checkpoint.tensor_files(files[0].parent)):
            raise FormatError(f"{files[0].parent}: transformers reads {files[0].name}, {checkpoint.INDEX} names other files; remove "
                              "those that are out of date, or copy the checkpoint again")
        prefix = self._fit_to(model)
        specs, modules = self.quantization_config.specs(), dict(model.named_modules())
        with torch.device("meta"):
            for name in self.quantization_config.experts:
                if name not in modules or not is_fused(modules[name]):
                    raise FormatError(f"quantization_config: {name!r} is no fused experts module of {type(model).__name__}; use the "
                                      "transformers version that the checkpoint was made with")
                if files and modules[name].down_proj.shape[0] > len(entries):
                    raise FormatError(f"{files[0].parent}: {name}: config.json asks for {modules[name].down_proj.shape[0]} experts, the "
                                      f"files hold {len(entries)} tensors; the files do not fit together")
                model.set_submodule(name, unfuse(modules[name]))
            modules = dict(model.named_modules())
            for name, spec in specs.items():
                linear = modules.get(name)
                shape = tuple(linear.weight.shape) if isinstance(linear, nn.Embedding) else linear_shape(linear)
                if shape != (spec.rows, spec.cols):
                    raise FormatError(f"quantization_config: layer {name!r}: got a spec for {(spec.rows, spec.cols)}, {type(model).__name__} "
                                      f"has {shape or 'no linear'} there; config.json is damaged or of another model")
                if isinstance(linear, nn.Embedding):
                    model.set_submodule(name, VQEmbedding(spec, linear.weight.dtype, scale_of(linear), "meta", name))
                    continue
                bias = linear.bias
                model.set_submodule(name, VQLinear(spec, bias is not None, "meta", None if bias is None else bias.dtype, name))
            for embedding, head in getattr(self.quantization_config, "tied", {}).items():
                try:
                    put_head(model, head, model.get_submodule(head), embedding)
                except (ConfigError, AttributeError) as error:          # the latter for a name that the model does not have
                    raise FormatError(f"quantization_config: tied: {error}; config.json is damaged or of another model") from error
        packed = {f"{layer}.{buffer}": kind for layer, spec in specs.items() for buffer, kind in spec.buffer_shapes().items()}
        if files and not _is_whole(model):      # its own head may be missing, and the stored one be left over
            for name, (shape, dtype) in packed.items():
                checkpoint.check_tensor(entries, prefix + name if prefix + name in entries else name, shape, dtype, str(files[0].parent))
        elif files:
            expected = {name: packed.get(name) or (tuple(tensor.shape), _kind(tensor)) for name, tensor in model.state_dict().items()}
            tied = getattr(model, "all_tied_weights_keys", None) or {}
            checkpoint.check_tensors(entries, expected, {*tied, *tied.values()}, str(files[0].parent))

    def _fit_to(self, model) -> str:
        """Narrows the settings to what a base model, or one with another head than was quantized, holds -> the prefix its names lack.

        Raises ConfigError where that is nothing, or where an embedding's weight is that of the missing head.
        """
        if _is_whole(model):
            return ""
        settings, prefix, modules = self.quantization_config, model.base_model_prefix + ".", dict(model.named_modules())
        for embedding, head in getattr(settings, "tied", {}).items():
            if head not in modules:
                raise ConfigError(f"{type(model).__name__} has no {head}, whose packed weight {embedding} shares; open this checkpoint by "
                                  "AutoModelForCausalLM: its base_model is the model without the head")
        inside = [name for name in settings.layers if name in modules or name.startswith(prefix)]
        if not inside:
            raise ConfigError(f"{type(model).__name__} has none of the packed layers; open this checkpoint by AutoModelForCausalLM")
        cut = "" if any(name in modules for name in inside) or any(name.startswith(prefix) for name in modules) else prefix
        self.quantization_config = settings = copy.copy(settings)
        settings.layers = {name.removeprefix(cut): settings.layers[name] for name in inside}
        settings.experts = [name.removeprefix(cut) for name in settings.experts]
        specs = settings.specs().values()
        settings.bits_per_value = 8 * sum(spec.nbytes for spec in specs) / sum(spec.rows * spec.cols for spec in specs)
        return cut

    def _process_model_after_weight_loading(self, model, **kwargs):
        if self._dense is not None:
            self._dense.clean_up()
            self._dense = None
        for name, module in model.named_modules():
            if isinstance(module, VQLinear):
                module.check(name)
                module.make_tables()
        return quicken(model) if torch.cuda.is_available() else large_pages.settle(quicken(model))

    def update_weight_conversions(self, weight_conversions, *_):
        if not self.pre_quantized:          # here, and not above, where transformers builds everything on the meta device
            self.quantization_config, self.pre_quantized = PackedGptvqConfig(**self._dense.quantize()), True
            self._put_in_place(self._dense.model, self._dense.files)
        return []                           # packed checkpoints are stored under the names of the modules

    def get_state_dict_and_metadata(self, model):
        return None, dict(checkpoint.RESAVED)           # transformers may leave an index of the folder's former files

    def is_serializable(self):
        return True

    @property
    def is_trainable(self):
        return True                         # of adapters beside the packed weights: gptvq.peft


def attach(model: nn.Module, settings: dict) -> None:
    """Finishes a model whose linears were replaced in memory: save_pretrained writes a checkpoint that loads, a dense head is made quick."""
    config = PackedGptvqConfig(**settings)
    model.hf_quantizer = GptvqQuantizer(config, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, checkpoint.METHOD
    model.config.quantization_config = config
    model._weight_conversions = []
    quicken(model)


def load(path: str | os.PathLike, device: str | torch.device | None = "auto", dtype: str | torch.dtype = "auto",
         activations: str = "a16") -> nn.Module:
    """The packed model of a local folder, in eval mode; device "auto" is the GPU where there is one.

    `dtype` is that of the tensors not quantized, "auto" as stored; `activations`: see VQLinear.  Raises FormatError for a damaged or incomplete checkpoint
    and ConfigError for a folder that holds none.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; need one written by gptvq.quantize")
    if not (folder / checkpoint.CONFIG).exists() and any(folder.glob("*.safetensors")):
        raise FormatError(f"{folder}: no config.json, so this checkpoint was never finished; quantize or copy it again")
    if not checkpoint.is_packed(folder):
        raise ConfigError(f"{folder}: not a gptvq checkpoint; quantize a model into it first")
    verify(folder, hashes=False)
    check_activations(activations)
    model = from_pretrained(folder, FormatError, dtype=read_dtype(dtype), local_files_only=True, use_safetensors=True)
    set_activations(model, activations)
    return large_pages.settle(model.to(pick_device(device))).eval()


def open_model(source: str | os.PathLike, device=None, dtype="auto", activations="a16") -> tuple[nn.Module, object]:
    """(model in eval mode, tokenizer or None) of a packed or dense folder, a .gguf file or a hub id."""
    if Path(source).is_dir() and checkpoint.is_packed(Path(source)):
        return load(source, device, dtype, activations), read_tokenizer(Path(source))
    model, tokenizer, _ = open_dense(source, dtype)
    return model.to(pick_device(device)), tokenizer


def open_dense(source: str | os.PathLike, dtype: str | torch.dtype = "auto") -> tuple[nn.Module, object, str]:
    """(model on the CPU in eval mode, tokenizer or None, a name) of a folder, a .gguf file or a hub id.

    Dtype "auto" is the stored one, bfloat16 for GGUF files, whose weights are unpacked.
    """
    dtype, path = read_dtype(dtype), Path(source)
    gguf = gguf_file(path)
    if gguf is not None:
        settings = transformers.GgufConfig(gguf_file=gguf.name, dequantize=True)
        model = from_pretrained(gguf.parent, ConfigError, gguf_file=gguf.name, quantization_config=settings,
                                 dtype=torch.bfloat16 if dtype == "auto" else dtype)
        for holder, name in ((model, "hf_quantizer"), (model.config, "quantization_config")):
            with contextlib.suppress(AttributeError):
                delattr(holder, name)       # the weights are dense now
        model.is_quantized = False
        tokenizer = read_tokenizer(gguf.parent, gguf_file=gguf.name)
        mend(gguf, tokenizer, model)
        return model.eval(), tokenizer, gguf.name
    if path.is_dir():
        if not (path / checkpoint.CONFIG).is_file():
            raise ConfigError(f"{path}: no config.json and no .gguf file in this folder; name a Hugging Face model's folder")
    elif path.exists() or str(source).startswith((".", "/", "~")) or str(source).count("/") > 1:
        raise ConfigError(f"{source}: no such model; need a folder, a .gguf file or a hub id")
    model, found = from_pretrained(source, ConfigError, dtype=dtype, output_loading_info=True)
    method = getattr(getattr(model.config, "quantization_config", None), "quant_method", None)
    if method is not None:
        raise ConfigError(f"{source}: already quantized ({getattr(method, 'value', method)}); start from the dense model")
    checkpoint.refuse_missing(found["missing_keys"], source)
    return model.eval(), read_tokenizer(source), path.resolve().name if path.is_dir() else str(source)


def pick_device(device: str | torch.device | None) -> torch.device:
    """None and "auto" are the GPU where there is one, else the CPU; raises ConfigError for one that is not there."""
    if device in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device: got {device!r}, need cpu, cuda or cuda:N") from error
    module = getattr(torch, device.type, None)          # none for "meta"
    count = module.device_count() if hasattr(module, "is_available") and module.is_available() else 0
    if (device.index or 0) >= count:
        raise ConfigError(f"device: got {device}, but torch sees {count or 'no'} {device.type.upper()} device{'s' * (count > 1)}; use "
                          f"{f'{device.type}:0' if count else 'cpu'}")
    return device


def _is_whole(model: nn.Module) -> bool:
    """Whether a checkpoint must hold all tensors of `model`: it is of the class that was stored, or a causal language model."""
    causal = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), ())
    return type(model).__name__ in (model.config.architectures or ()) or isinstance(model, causal)


def _kind(tensor: torch.Tensor) -> str:
    return checkpoint.ANY_FLOAT if tensor.is_floating_point() else str(tensor.dtype)[6:]


def linear_shape(module: nn.Module | None) -> tuple[int, int] | None:
    """(out, in) of an nn.Linear or Conv1D, else None."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return tuple(module.weight.shape[::-1]) if module is not None and is_conv1d(module) else None


def from_pretrained(source, failure, **kwargs) -> nn.Module:
    try:
        with torch.random.fork_rng(devices=[]):         # some models draw random numbers before their weights are read
            return transformers.AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False, **kwargs)
    except GptvqError:
        raise
    except Exception as error:      # whatever the hub, a config class or a tensor file raises: here it all means "cannot be loaded"
        raise failure(f"{source}: transformers cannot load it as a causal language model ({type(error).__name__}: {error})") from error


def read_tokenizer(source, **kwargs):
    """The tokenizer, or None where a local folder holds no tokenizer files."""
    if Path(source).is_dir() and not kwargs and not any((Path(source) / name).exists() for name in _TOKENIZER_FILES):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False, **kwargs)
    except Exception as error:      # as above
        raise ConfigError(f"{source}: transformers cannot load its tokenizer ({type(error).__name__}: {error})") from error


def read_dtype(dtype: str | torch.dtype):
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"dtype: got {dtype!r}, need one of {', '.join(DTYPES)}")
    return "auto" if name == "auto" else getattr(torch, name)


AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(checkpoint.METHOD, PackedGptvqConfig)
AUTO_QUANTIZER_MAPPING.setdefault(checkpoint.METHOD, GptvqQuantizer)
