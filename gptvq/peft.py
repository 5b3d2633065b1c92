"""peft: LoRA adapters on packed linears (arXiv 2106.09685; on quantized weights arXiv 2305.14314).

Importing this module teaches peft's LoRA the layer VQLinear; `import gptvq` arranges for that once peft is loaded.
"""
from __future__ import annotations

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .embedding import VQEmbedding
from .errors import ConfigError
from .linear import VQLinear


class LoraVQLinear(nn.Module, LoraLayer):
    """y = VQLinear(x) + scaling B A x: the packed weight is frozen, gradients reach x, A and B."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config, r: int = 0, lora_alpha: int = 1, **kwargs):
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        for setting in ("use_dora", "lora_bias"):
            if getattr(config, setting, False):
                raise ConfigError(f"{setting}: a packed linear takes plain LoRA only; leave {setting} out of LoraConfig")
        if config.init_lora_weights not in (True, False, "gaussian", "orthogonal", "eva"):
            raise ConfigError(f"init_lora_weights: got {config.init_lora_weights!r}, which changes the base weight; a packed one is fixed: use "
                              "True, False, 'gaussian', 'orthogonal' or 'eva'")
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if kwargs.pop("adapter_names", None) is not None:
            raise ConfigError("adapter_names: one batch with several adapters is not supported on packed linears; run it once per adapter")
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return y
        for name in self.active_adapters:
            if name not in self.lora_A:
                continue
            A, B = self.lora_A[name], self.lora_B[name]
            inside = x if torch.is_autocast_enabled(x.device.type) else self._cast_input_dtype(x, A.weight.dtype)
            y = y + (self.scaling[name] * B(A(self.lora_dropout[name](inside)))).to(y.dtype)
        return y

    def get_delta_weight(self, adapter: str) -> Tensor:
        """scaling B A [out, in] in the adapter's dtype, computed in float32: what add_weighted_adapter decomposes."""
        A, B = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        return (B.float() @ A.float() * self.scaling[adapter]).to(B.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        _refuse_merging()

    def unmerge(self) -> None:
        raise ConfigError("nothing was merged: adapters stay beside packed weights")

    def __repr__(self) -> str:
        return "lora." + super().__repr__()


def packed_linears(model: nn.Module) -> list[str]:
    """The last parts of the packed linears' names, for LoraConfig(target_modules=...); peft's "all-linear" sees dense ones alone.

    As there, the output head is left out.
    """
    others = model.get_output_embeddings(), model.get_input_embeddings()
    return sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, VQLinear) and module not in others})


def _with_packed(create):
    def create_new_module(lora_config, adapter_name, target, **kwargs):
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(base, VQEmbedding):
            raise ConfigError(f"target_modules: {base.name or 'the embedding'} is a packed embedding, which takes no adapter; leave it out, "
                              "or quantize without a format for the head")
        if isinstance(base, VQLinear):
            return LoraVQLinear(target, adapter_name, config=lora_config, **kwargs)
        return create(lora_config, adapter_name, target, **kwargs)

    return create_new_module


def _refuse_merging() -> None:
    raise ConfigError("a packed weight has a fixed set of values, so that no adapter can be merged into it; keep the adapter beside it "
                      "(save_pretrained), join several by add_weighted_adapter, or merge into the dense model (gptvq export --dense)")


def _knowing_packed(check):
    def _check_merge_allowed(self):
        if any(isinstance(module, LoraVQLinear) for module in self.model.modules()):
            _refuse_merging()               # before the adapters of dense modules are merged and gone
        return check(self)

    return _check_merge_allowed


LoraModel._create_new_module = staticmethod(_with_packed(LoraModel._create_new_module))
LoraModel._check_merge_allowed = _knowing_packed(LoraModel._check_merge_allowed)
