"""vLLM: packed checkpoints served by it, as an out-of-tree plugin (entry point vllm.general_plugins).

Every rank keeps its rows (q, k, v, gate, up) or columns (o, down) of the packed weights.  Layers that vLLM fuses keep a part for each
weight of the checkpoint, with that weight's own codebooks.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import (
    QUANTIZATION_METHODS,
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.utils import set_weight_attrs

from . import checkpoint
from .errors import ConfigError, FormatError
from .linear import VQLinear
from .shard import shard_buffer, shard_spec
from .spec import QuantSpec
from .weight import DTYPES, VQWeight, check_values

_NO_HEADS = "packed output heads and embeddings cannot be served by vLLM yet; quantize without --head, use transformers, or `gptvq export --dense`"
_ALIGN = 64                 # elements: parts begin at aligned addresses in the parameter that holds them


def register() -> None:
    """Makes the format known to vLLM, which calls this in each of its processes, possibly more than once."""
    if checkpoint.METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(checkpoint.METHOD)(GptvqVllmConfig)


class GptvqVllmConfig(QuantizationConfig):
    """The quantization_config of a checkpoint; which layers are packed, and how.  Raises FormatError for damaged settings."""

    def __init__(self, layers: dict[str, QuantSpec], experts: list[str]):
        super().__init__()
        self.layers, self.experts = layers, experts

    @classmethod
    def from_config(cls, config: dict) -> GptvqVllmConfig:
        if tied := config.get("tied"):
            raise ConfigError(f"{', '.join(tied)}: {_NO_HEADS}")
        return cls(checkpoint.layer_specs(config, "quantization_config"), list(config.get("experts") or []))

    def get_name(self) -> str:
        return checkpoint.METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []                                       # the settings are in config.json, which vLLM reads anyway

    def apply_vllm_mapper(self, hf_to_vllm_mapper) -> None:
        self.layers, self.experts = hf_to_vllm_mapper.apply_dict(self.layers), hf_to_vllm_mapper.apply_list(self.experts)

    def get_quant_method(self, layer: nn.Module, prefix: str):
        """Of a linear, packed in whole or in part; None leaves anything else to vLLM.  ConfigError for experts."""
        inside = any(prefix == name or prefix.startswith(name + ".") for name in self.experts)
        if inside or type(layer).__name__ in ("FusedMoE", "RoutedExperts"):
            raise ConfigError(f"{prefix}: mixtures of experts cannot be served by vLLM in this format yet; use transformers, or "
                              "`gptvq export --dense`")
        if not isinstance(layer, LinearBase):
            if prefix in self.layers:
                raise ConfigError(f"{prefix}: {_NO_HEADS}")
            return None
        names = self.parts_of(prefix)
        if not any(name in self.layers for name in names):
            return UnquantizedLinearMethod()
        return GptvqLinearMethod(names, [self.layers.get(name) for name in names])

    def parts_of(self, prefix: str) -> list[str]:
        """The checkpoint's names of what vLLM fuses into the layer `prefix`; the layer itself where it is stored in one."""
        parent, _, last = prefix.rpartition(".")
        if prefix in self.layers or last not in self.packed_modules_mapping:
            return [prefix]
        return [f"{parent}.{part}" if parent else part for part in self.packed_modules_mapping[last]]


@dataclass
class _Part:
    """This rank's share of one weight of the checkpoint: `height` rows and the columns `cols`; `spec` is the whole's, None of a dense one."""

    name: str
    spec: QuantSpec | None
    height: int
    cols: range
    rank: int               # among those that share the rows out; 0 of 1 where the columns are shared out
    ranks: int

    def held(self, rows: int) -> range:
        """Those of all `rows`; with fewer key and value heads than ranks, several ranks hold the same."""
        start = self.rank // max(1, self.ranks // max(1, rows // self.height)) * self.height
        return range(start, start + self.height)

    @property
    def local(self) -> QuantSpec | None:
        """The format of the share."""
        return None if self.spec is None else shard_spec(self.spec, self.held(self.spec.rows), self.cols, self.name)

    def shapes(self, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        if self.local is None:
            return {"weight": ((self.height, len(self.cols)), dtype)}
        return {buffer: (shape, DTYPES[kind]) for buffer, (shape, kind) in self.local.buffer_shapes().items()}

    def share(self, buffer: str, tensor: Tensor) -> Tensor:
        """The part of a checkpoint's tensor that this rank keeps.  Raises FormatError for one of another shape or type."""
        if self.spec is None:
            rows = self.held(tensor.shape[0])
            return tensor[rows.start:rows.stop, self.cols.start:self.cols.stop]
        shape, kind = self.spec.buffer_shapes()[buffer]
        if tuple(tensor.shape) != shape or tensor.dtype != DTYPES[kind]:
            raise FormatError(f"{self.name}.{buffer}: got {tensor.dtype} {tuple(tensor.shape)}, need torch.{kind} {shape}; the file and "
                              "config.json do not fit together")
        if (self.height, len(self.cols)) == (self.spec.rows, self.spec.cols):
            return tensor
        return shard_buffer(buffer, tensor, self.spec, self.held(self.spec.rows), self.cols)


class GptvqLinearMethod(LinearMethodBase):
    """One flat parameter per packed buffer, in which the parts of a fused layer lie one after the other."""

    def __init__(self, names: list[str], specs: list[QuantSpec | None]):
        self.names, self.specs = names, specs

    def create_weights(self, layer: nn.Module, input_size_per_partition: int, output_partition_sizes: list[int], input_size: int,
                       output_size: int, params_dtype: torch.dtype, **extra_weight_attrs) -> None:
        parts = self._parts(layer, input_size_per_partition, output_partition_sizes, input_size)
        places: dict[str, list[tuple[int, tuple[int, ...]] | None]] = {}       # buffer -> per part its (offset, shape)
        sizes: dict[str, tuple[int, torch.dtype]] = {}
        for i, part in enumerate(parts):
            for buffer, (shape, dtype) in part.shapes(params_dtype).items():
                offset = sizes.get(buffer, (0, dtype))[0]
                places.setdefault(buffer, [None] * len(parts))[i] = offset, shape
                sizes[buffer] = offset + -(-torch.Size(shape).numel() // _ALIGN) * _ALIGN, dtype
        loaded: set[tuple[str, int]] = set()
        layer.gptvq_state = parts, places, loaded
        for buffer, (size, dtype) in sizes.items():
            parameter = nn.Parameter(torch.zeros(size, dtype=dtype), requires_grad=False)
            set_weight_attrs(parameter, {"weight_loader": _loader(buffer, parts, places[buffer], loaded)})
            layer.register_parameter(buffer, parameter)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """A VQLinear, or of a dense part the matrix, over each part's share of the parameters.  FormatError: a tensor never came, or
        its values are damaged."""
        parts, places, loaded = layer.gptvq_state
        runs = []
        for i, part in enumerate(parts):
            views = {}
            for buffer, found in ((b, p[i]) for b, p in places.items() if p[i] is not None):
                if (buffer, i) not in loaded:
                    raise FormatError(f"{part.name}: tensor {part.name + '.' + buffer!r} is missing; copy the files again, or quantize again")
                offset, shape = found
                views[buffer] = getattr(layer, buffer).data[offset:offset + torch.Size(shape).numel()].view(shape)
            if part.local is not None:
                check_values(part.local, views, part.name)
            runs.append(views["weight"] if part.local is None else VQLinear.from_weight(VQWeight(part.local, views), name=part.name))
        layer.gptvq_runs = runs                         # a list: not modules of the layer, whose parameters they share

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [.., columns of this rank] -> [.., its rows of all parts]."""
        outs = [nn.functional.linear(x, run) if isinstance(run, Tensor) else run(x) for run in layer.gptvq_runs]
        out = outs[0] if len(outs) == 1 else torch.cat(outs, -1)
        return out if bias is None else out + bias

    def _parts(self, layer, width: int, heights: list[int], input_size: int) -> list[_Part]:
        rank, ranks = getattr(layer, "tp_rank", 0), getattr(layer, "tp_size", 1)
        if len(self.names) == 1 and len(heights) > 1:   # fused in the checkpoint already
            if ranks > 1:
                raise ConfigError(f"{self.names[0]}: one packed weight for {len(heights)} outputs cannot be shared by {ranks} ranks; use a "
                                  "tensor-parallel size of 1, or `gptvq export --dense`")
            heights = [sum(heights)]
        if len(self.names) != len(heights):
            raise ConfigError(f"{', '.join(self.names)}: vLLM fuses {len(heights)} outputs here, need {len(self.names)}; this model's "
                              "layers cannot be served in this format")
        for name, spec, height in zip(self.names, self.specs, heights):
            if spec is not None and (spec.cols != input_size or spec.rows % height):
                raise ConfigError(f"{name}: the packed weight is {spec.rows} x {spec.cols}, vLLM's layer wants {height} rows of it on a "
                                  f"rank and {input_size} columns; it cannot be served with this tensor-parallel size")
        first, rank, ranks = (rank * width, 0, 1) if width < input_size else (0, rank, ranks)
        cols = range(first, first + width)
        return [_Part(name, spec, height, cols, rank, ranks) for name, spec, height in zip(self.names, self.specs, heights)]


def _loader(buffer: str, parts: list[_Part], places: list, loaded: set[tuple[str, int]]):
    """What vLLM calls with each tensor of the checkpoint, and with the part of the fused layer that it belongs to."""
    def load(parameter: nn.Parameter, tensor: Tensor, shard_id: str | int | None = None) -> None:
        index = {None: 0, "q": 0, "k": 1, "v": 2}.get(shard_id, shard_id)
        if not isinstance(index, int) or not 0 <= index < len(parts) or places[index] is None or shard_id is None and len(parts) > 1:
            raise FormatError(f"{parts[0].name}.{buffer}: got a tensor for part {shard_id!r}, need one of {len(parts)} packed parts; the file "
                              "and config.json do not fit together")
        offset, shape = places[index]
        share = parts[index].share(buffer, tensor)
        if tuple(share.shape) != shape:
            raise FormatError(f"{parts[index].name}.{buffer}: got {tuple(share.shape)}, need {shape}; the file and config.json do not fit "
                              "together")
        parameter.data[offset:offset + share.numel()].copy_(share.reshape(-1))
        loaded.add((buffer, index))

    return load
