"""The part of vLLM's interface that a quantization plugin sees, as its documentation describes it, for machines without vLLM.

Layers are made, loaded and called in vLLM's order; `ranks` stands for the tensor-parallel group that vLLM would ask.
"""
import sys
import types
from abc import ABC, abstractmethod

import torch
from torch import nn

ranks = {"rank": 0, "size": 1}
QUANTIZATION_METHODS = ["awq"]
REGISTERED = {}


def register_quantization_config(name):
    def wrap(cls):
        if name in QUANTIZATION_METHODS or not issubclass(cls, QuantizationConfig):
            raise ValueError(name)
        QUANTIZATION_METHODS.append(name)
        REGISTERED[name] = cls
        return cls
    return wrap


def set_weight_attrs(weight, attrs):
    for key, value in attrs.items():
        assert not hasattr(weight, key)
        setattr(weight, key, value)


class QuantizationConfig(ABC):
    def __init__(self):
        self.packed_modules_mapping = {}

    @abstractmethod
    def get_name(self): ...

    @abstractmethod
    def get_supported_act_dtypes(self): ...

    @classmethod
    @abstractmethod
    def get_min_capability(cls): ...

    @staticmethod
    @abstractmethod
    def get_config_filenames(): ...

    @classmethod
    @abstractmethod
    def from_config(cls, config): ...

    @abstractmethod
    def get_quant_method(self, layer, prefix): ...


class LinearMethodBase(ABC):
    @abstractmethod
    def create_weights(self, layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype, **extra): ...

    @abstractmethod
    def apply(self, layer, x, bias=None): ...

    def process_weights_after_loading(self, layer):
        return


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(self, layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype, **extra):
        layer.weight = nn.Parameter(torch.empty(sum(output_partition_sizes), input_size_per_partition, dtype=params_dtype), requires_grad=False)

    def apply(self, layer, x, bias=None):
        return nn.functional.linear(x, layer.weight, bias)


class LinearBase(nn.Module):
    def __init__(self, columns, heights, input_size, output_size, params_dtype, quant_config, prefix, ranked=True):
        super().__init__()
        self.tp_rank, self.tp_size = (ranks["rank"], ranks["size"]) if ranked else (0, 1)
        self.quant_method = quant_config.get_quant_method(self, prefix)
        self.quant_method.create_weights(layer=self, input_size_per_partition=columns, output_partition_sizes=heights, input_size=input_size,
                                         output_size=output_size, params_dtype=params_dtype or torch.get_default_dtype(), weight_loader=None)


class ReplicatedLinear(LinearBase):
    def __init__(self, input_size, output_size, bias=True, params_dtype=None, quant_config=None, prefix=""):
        super().__init__(input_size, [output_size], input_size, output_size, params_dtype, quant_config, prefix, ranked=False)


class MergedColumnParallelLinear(LinearBase):
    def __init__(self, input_size, output_sizes, bias=True, params_dtype=None, quant_config=None, prefix=""):
        heights = [n // ranks["size"] for n in output_sizes]
        super().__init__(input_size, heights, input_size, sum(output_sizes), params_dtype, quant_config, prefix)


class ColumnParallelLinear(MergedColumnParallelLinear):
    def __init__(self, input_size, output_size, **more):
        super().__init__(input_size, [output_size], **more)


class QKVParallelLinear(MergedColumnParallelLinear):
    def __init__(self, hidden_size, head_size, total_num_heads, total_num_kv_heads=None, **more):
        kv = max(total_num_kv_heads, ranks["size"]) * head_size       # several ranks hold the same head
        super().__init__(hidden_size, [total_num_heads * head_size, kv, kv], **more)


class RowParallelLinear(LinearBase):
    def __init__(self, input_size, output_size, bias=True, params_dtype=None, quant_config=None, prefix=""):
        super().__init__(input_size // ranks["size"], [output_size], input_size, output_size, params_dtype, quant_config, prefix)


def install():
    """Puts the stub in the place of vLLM's modules; returns the names."""
    here = sys.modules[__name__]
    names = {"vllm": [], "vllm.model_executor": [], "vllm.model_executor.layers": [], "vllm.model_executor.utils": ["set_weight_attrs"],
             "vllm.model_executor.layers.quantization": ["register_quantization_config", "QUANTIZATION_METHODS"],
             "vllm.model_executor.layers.quantization.base_config": ["QuantizationConfig"],
             "vllm.model_executor.layers.linear": [name for name in dir(here) if "Linear" in name]}
    for name, exported in names.items():
        module = types.ModuleType(name)
        module.__path__ = []
        for each in exported:
            setattr(module, each, getattr(here, each))
        sys.modules[name] = module
    return list(names)
