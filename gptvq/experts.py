"""Mixture-of-experts weights fused into 3-D parameters, unfused into one nn.Linear per expert and matrix."""
from __future__ import annotations

import copy
import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

#: Names of mixture-of-experts routers; their few weights decide where tokens go and stay as they are.
ROUTERS = ("gate", "wg", "router", "shared_expert_gate")
_MATRIX = 32        # rows and columns that make a matrix; a channel's states, mixing weights and depthwise kernel have fewer
_SIGNATURES = (["hidden_states", "top_k_index", "top_k_weights"], ["hidden_states", "router_indices", "routing_weights"])
_MATRICES = {"gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias"}


class Expert(nn.Module):
    """x [n, hidden] -> [n, hidden]: down(gating(gate(x), up(x)))."""

    def __init__(self, fused: nn.Module, index: int):
        super().__init__()
        for name, (weight, bias) in _matrices(fused, index).items():
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
            linear.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format), requires_grad=False)
            if bias is not None:
                linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
            setattr(self, name, linear)


class UnfusedExperts(nn.ModuleList):
    """The forward interface and results of a fused experts module, from linears that can be replaced one by one."""

    def __init__(self, fused: nn.Module):
        super().__init__(Expert(fused, index) for index in range(fused.down_proj.shape[0]))
        # The class's own gating rule (activation, clamps) reads settings of the fused module: keep it without its weights.
        rule = copy.copy(fused)
        rule._parameters = {}
        self.__dict__["rule"] = rule

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, hidden], top_k_index and top_k_weights [tokens, k] -> [tokens, hidden]."""
        out = torch.zeros_like(hidden_states)
        # Sorted once: a GPU is waited for once a call, not once an expert.
        chosen, order = top_k_index.T.flatten().sort(stable=True)
        ends = torch.searchsorted(chosen, torch.arange(len(self) + 1, dtype=chosen.dtype, device=chosen.device)).tolist()
        for expert, first, last in zip(self, ends, ends[1:]):
            if first < last:
                slot, token = order[first:last] // len(top_k_index), order[first:last] % len(top_k_index)
                y = expert.down_proj(self._gated(expert, hidden_states[token])) * top_k_weights[token, slot, None]
                out.index_add_(0, token, y.to(out.dtype))
        return out

    def _gated(self, expert: Expert, x: Tensor) -> Tensor:
        if not hasattr(expert, "gate_proj"):
            return self.rule.act_fn(expert.up_proj(x))
        gate, up = expert.gate_proj(x), expert.up_proj(x)
        if getattr(self.rule, "is_concatenated", True):
            return self.rule._apply_gate(torch.cat([gate, up], -1))
        return self.rule._apply_gate(torch.stack([gate, up], -1).flatten(-2))


def is_fused(module: nn.Module) -> bool:
    """Whether this is an experts module in transformers' common form, which `unfuse` understands."""
    parameters = dict(module.named_parameters())
    up = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    return ({up, "down_proj"} <= set(parameters) <= _MATRICES
            and all(parameters[name].ndim == 3 for name in (up, "down_proj"))
            and (up == "up_proj" or hasattr(module, "_apply_gate"))
            and list(inspect.signature(type(module).forward).parameters)[1:] in _SIGNATURES)


def in_router(name: str) -> bool:
    """Whether a module of a block, by its name there, is a router or a part of one."""
    return any(part in ROUTERS for part in name.split("."))


def matrices(module: nn.Module) -> int:
    """Numbers in the module's own parameters that are matrices, or stacks of them, unless it is a linear, embedding or norm."""
    if isinstance(module, (nn.Linear, nn.Embedding)) or "Norm" in type(module).__name__:
        return 0
    own = [p for p in module.parameters(recurse=False) if p.ndim > 1]
    return sum(p.numel() for p in own if sorted(p.shape)[-2] >= _MATRIX)


@torch.no_grad()
def unfuse(fused: nn.Module) -> UnfusedExperts | None:
    """The unfused form, or None where it would not compute the same (checked on random tokens unless on meta)."""
    unfused = UnfusedExperts(fused)
    if fused.down_proj.is_meta:
        return unfused
    experts, hidden, dtype, device = len(unfused), unfused[0].down_proj.out_features, fused.down_proj.dtype, fused.down_proj.device
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, hidden, generator=generator).to(device, dtype)
    index = torch.stack([torch.randperm(experts, generator=generator)[:2] for _ in range(16)]).to(device)
    weights = torch.rand(index.shape, generator=generator).to(device, dtype)
    want, got = fused(x, index, weights).float(), unfused(x, index, weights).float()
    return unfused if float((want - got).abs().max()) <= 16 * torch.finfo(dtype).eps * float(want.abs().max()) else None


def _matrices(fused: nn.Module, index: int) -> dict[str, tuple[Tensor, Tensor | None]]:
    """{linear name: ([out, in], bias)} of one expert."""
    def matrix(name: str) -> Tensor:
        weight = getattr(fused, name)[index]
        return weight.T if getattr(fused, "is_transposed", False) else weight

    def bias(name: str) -> Tensor | None:
        stored = getattr(fused, f"{name}_bias", None)
        return None if stored is None else stored[index]

    down = matrix("down_proj"), bias("down_proj")
    if not hasattr(fused, "gate_up_proj"):
        return {"up_proj": (matrix("up_proj"), bias("up_proj")), "down_proj": down}
    halves = []
    for tensor in (matrix("gate_up_proj"), bias("gate_up_proj")):
        if tensor is None:
            halves.append((None, None))
        elif getattr(fused, "is_concatenated", True):
            halves.append(tensor.chunk(2))
        else:
            halves.append((tensor[::2], tensor[1::2]))
    (gate, up), (gate_bias, up_bias) = halves
    return {"gate_proj": (gate, gate_bias), "up_proj": (up, up_bias), "down_proj": down}


@torch.no_grad()
def fused_parameter(fused: nn.Module, parameter: str, dtype: torch.dtype, part: Callable[[str], Tensor]) -> Tensor:
    """A parameter of the fused module (on meta), from part("EXPERT.LINEAR.weight" or ".bias"): the reverse of `unfuse`."""
    shell = copy.copy(fused)
    whole = torch.empty(getattr(fused, parameter).shape, dtype=dtype)
    shell._parameters = {**fused._parameters, parameter: whole}
    for index in range(len(whole)):
        for linear, views in _matrices(shell, index).items():
            for view, leaf in zip(views, ("weight", "bias")):
                if view is not None and not view.is_meta:       # views of `whole`: writing into them fills it
                    view.copy_(part(f"{index}.{linear}.{leaf}"))
    return whole
