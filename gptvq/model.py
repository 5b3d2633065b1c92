"""The decoder blocks of a model and their linears, discovered from a real call."""
from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from .errors import ConfigError, NumericalError
from .experts import in_router, is_fused, matrices, unfuse
from .hessian import Hessian, borrow
from .machine import home_of

_PROBE_TOKENS = 8


@dataclass
class Block:
    """One decoder block and how the model calls it; `args` and `kwargs` hold everything but the hidden state."""
    name: str
    module: nn.Module
    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    hidden_at: int | str = 0            # position or keyword of the hidden state
    in_tuple: bool = False              # whether its output is the first of several

    def __call__(self, hidden: Tensor) -> Tensor:
        """[1, tokens, width] -> [1, tokens, width], with the recorded masks and position tables."""
        args, kwargs = list(self.args), dict(self.kwargs)
        if isinstance(self.hidden_at, int):
            args[self.hidden_at] = hidden
        else:
            kwargs[self.hidden_at] = hidden
        return _output(self.module(*args, **kwargs))

    def to(self, device: torch.device | str) -> Block:
        """Moves the module and the recorded arguments; the module moves in place."""
        self.module.to(device)
        self.args, self.kwargs = tree_map_only(Tensor, lambda t: t.to(device), (self.args, self.kwargs))
        return self


class Stop(Exception):
    """Ends a forward that has given all that is wanted."""


@torch.no_grad()
def find_blocks(model: nn.Module, tokens: Tensor) -> list[Block]:
    """The members of the nn.ModuleList that a real call runs one after the other, each on the output of the one before.

    tokens: [1, n] ids; a few are enough.  Among several such lists, outermost ones first, the one with most parameters
    counts.  Raises ConfigError where there is none.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)}
    calls: dict[str, list] = {name: [] for name in lists}
    handles = []
    for name, members in lists.items():
        for index, member in enumerate(members):
            handles.append(member.register_forward_hook(
                lambda m, args, kwargs, out, log=calls[name], i=index: log.append((i, _hidden(args, kwargs)[1], _output(out))),
                with_kwargs=True))
    try:
        call(model, tokens[:, :_PROBE_TOKENS])
    finally:
        for handle in handles:
            handle.remove()
    chains = [name for name in lists if _is_chain(calls[name], len(lists[name]))]
    outer = [name for name in chains if not any(name.startswith(other + ".") for other in chains)]
    if not outer:
        linears = sum(isinstance(m, nn.Linear) for m in model.modules())
        raise ConfigError(f"{type(model).__name__}: no list of decoder blocks was called one after the other, each on the output of "
                          f"the one before ({linears} nn.Linear in the model); need a decoder-only language model")
    best = max(outer, key=lambda name: sum(p.numel() for p in lists[name].parameters()))
    return [Block(f"{best}.{index}", member) for index, member in enumerate(lists[best])]


@torch.no_grad()
def record_calls(model: nn.Module, blocks: list[Block], tokens: Tensor, device: torch.device) -> None:
    """Fills in the arguments of every block from one real call on `tokens` [1, n], whose blocks run on `device`.

    Raises ConfigError unless the model calls the blocks one after the other, each on the output of the one before.
    """
    called: list[Block] = []
    last: list[Any] = [None]

    def before(block: Block, args: tuple, kwargs: dict) -> None:
        block.hidden_at, hidden = _hidden(args, kwargs)
        block.args = tuple(None if block.hidden_at == i else a for i, a in enumerate(args))
        block.kwargs = {k: v for k, v in kwargs.items() if k != block.hidden_at}
        if block is not blocks[len(called)] or called and not _same(last[0], hidden):
            raise ConfigError(f"{type(model).__name__}: {block.name} is not called on the output of the block before it; need a "
                              "decoder-only language model. If it is one, load it and pass the module instead of its name")
        called.append(block)

    def after(block: Block, out: Any) -> None:
        last[0], block.in_tuple = _output(out), _output(out) is not out
        if block is blocks[-1]:
            raise Stop

    _until_stopped(model, tokens, run_on(device, model, blocks, before, after))


def run_on(device: torch.device, model: nn.Module, blocks: list[Block], before: Callable | None = None,
           after: Callable | None = None) -> list:
    """Handles of hooks with which the blocks of a call on `model` run on `device`, one there at a time."""
    handles, home = [], home_of(model)
    for block in blocks:
        def enter(module, args, kwargs, block=block):
            if before is not None:
                before(block, args, kwargs)
            module.to(device)
            return tree_map_only(Tensor, lambda t: t.to(device), (args, kwargs))

        def leave(module, args, out, block=block):
            module.to(home)
            out = tree_map_only(Tensor, lambda t: t.to(home), out)
            if after is not None:
                after(block, out)
            return out

        handles += [block.module.register_forward_pre_hook(enter, with_kwargs=True), block.module.register_forward_hook(leave)]
    return handles


@torch.no_grad()
def embed(model: nn.Module, blocks: list[Block], tokens: Tensor, new: Callable[[], list[Tensor]] = list) -> list[Tensor]:
    """The hidden states [1, tokens, width] that enter the first block, one per row of `tokens` [samples, n], in a `new` list.

    Raises ConfigError for models whose blocks get more from the tokens than the hidden state, and NumericalError for
    non-finite values.
    """
    first, hidden = blocks[0], new()

    def stop(module, args, kwargs):
        at, state = _hidden(args, kwargs)
        rest = tuple(None if at == i else a for i, a in enumerate(args)), {k: v for k, v in kwargs.items() if k != at}
        if not _same(rest, (first.args, first.kwargs)):
            raise ConfigError(f"{first.name}: its arguments beside the hidden state differ from sample to sample; "
                              f"{type(model).__name__} feeds tokens to its blocks in another way, which is not supported")
        if not bool(torch.isfinite(state).all()):
            raise NumericalError(f"embeddings: non-finite activations enter {first.name}; the source checkpoint is damaged or its "
                                 "dtype overflowed, try dtype float32")
        hidden.append(state.clone())
        raise Stop

    for ids in tokens:
        _until_stopped(model, ids[None], [first.module.register_forward_pre_hook(stop, with_kwargs=True)])
    return hidden


def linears(root: nn.Module, prefix: str) -> dict[str, nn.Module]:
    """{full name: module} of every nn.Linear and Conv1D (transformers', transposed) below `root`, routers left out."""
    return {name: module for name, module in root.named_modules(prefix=prefix)
            if (isinstance(module, nn.Linear) or is_conv1d(module)) and not in_router(name.removeprefix(prefix))}


def unfuse_experts(model: nn.Module, blocks: list[Block]) -> tuple[list[str], list[str]]:
    """Unfuses the experts inside the blocks, in place -> (their names, warnings about those that are left as they are)."""
    names, warnings = [], []
    for block in blocks:
        for name, module in list(block.module.named_modules(prefix=block.name)):
            unfused = unfuse(module) if is_fused(module) else None
            if unfused is not None:
                model.set_submodule(name, unfused)
                names.append(name)
            elif not is_conv1d(module) and not in_router(name.removeprefix(block.name)) and (size := matrices(module)):
                warnings.append(f"{name}: {size} weights in parameters of {type(module).__name__}, a form not known, were left dense")
    return names, warnings


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D: a linear whose weight is stored [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def dense_weight(linear: nn.Module) -> Tensor:
    """[out, in], whatever way round the module stores it."""
    return linear.weight.T if is_conv1d(linear) else linear.weight


def in_list(block: Block, name: str) -> bool:
    """Whether the linear is inside an nn.ModuleList of the block: one of several experts, which may be idle."""
    return any(name.startswith(f"{block.name}.{inner}.") for inner, module in block.module.named_modules()
               if inner and isinstance(module, nn.ModuleList))


def fill_up(block: Block, hessians: dict[str, Hessian]) -> dict[str, Hessian]:
    """Hessians of all samples; those of one matrix, of one width, of several members of a ModuleList borrow from each other."""
    alike: dict[tuple, dict[int, Hessian]] = {}
    for name, hessian in hessians.items():
        if in_list(block, name):
            alike.setdefault((re.sub(r"\.\d+\.", ".*.", name.removeprefix(block.name)), len(hessian.sum)), {})[id(hessian)] = hessian
    for members in alike.values():
        if len(members) > 1:
            borrow(list(members.values()))
    return hessians


def identity(x: Tensor) -> tuple:
    """Equal for two calls on one tensor that was not changed in between, as long as it is kept."""
    return x.data_ptr() or id(x), tuple(x.shape), x.stride(), x.dtype, x._version


class InputCollector:
    """Hessians of the inputs of `linears` while their block runs; linears called on one tensor share one Hessian.

    Use as a context manager around the calls, and call `next_sample` between two of them.  `hessian(name)` afterwards.
    """

    def __init__(self, linears: dict[str, nn.Module], device: torch.device):
        self.linears, self.device = linears, device
        self.leader: dict[str, str] = {}                # linear -> the first one seen on the same input
        self.hessians: dict[str, Hessian] = {}
        self._seen: dict[tuple, tuple[str, Tensor]] = {}
        self._handles: list = []

    def __enter__(self) -> InputCollector:
        for name, linear in self.linears.items():
            self._handles.append(linear.register_forward_pre_hook(lambda m, args, name=name: self._add(name, args[0])))
        return self

    def __exit__(self, *exception) -> None:
        for handle in self._handles:
            handle.remove()
        self._seen.clear()

    def next_sample(self) -> None:
        self._seen.clear()

    def hessian(self, name: str) -> Hessian:
        """With 0 tokens for a linear that was never called."""
        if name not in self.leader:
            self.hessians[name] = Hessian(dense_weight(self.linears[name]).shape[1], self.device)
            self.leader[name] = name
        return self.hessians[self.leader[name]]

    def finish(self, block: Block) -> dict[str, Hessian]:
        """The Hessians of all linears, once all samples have been added."""
        return fill_up(block, {name: self.hessian(name) for name in self.linears})

    def _add(self, name: str, x: Tensor) -> None:
        # The tensor is kept with its key: a freed one's address would be given out again.
        first, _ = self._seen.setdefault(identity(x), (name, x))
        leader = self.leader.setdefault(name, self.leader.get(first, first))
        if leader == name:
            self.hessians.setdefault(name, Hessian(x.shape[-1], self.device)).add(x)


def call(model: nn.Module, tokens: Tensor) -> Any:
    """The model's own forward on `tokens` [samples, n], without a cache."""
    takes_cache = "use_cache" in inspect.signature(model.forward).parameters or hasattr(model, "generation_config")
    return model(tokens.to(home_of(model)), **({"use_cache": False} if takes_cache else {}))


def _until_stopped(model: nn.Module, tokens: Tensor, handles: list) -> None:
    try:
        call(model, tokens)
    except Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()


def _hidden(args: tuple, kwargs: dict) -> tuple[int | str, Tensor | None]:
    """Where the hidden state is among a block's arguments: the first floating tensor; (0, None) where there is none."""
    for at, value in (*enumerate(args), *kwargs.items()):
        if isinstance(value, Tensor) and value.is_floating_point():
            return at, value
    return 0, None


def _output(out: Any) -> Any:
    return out[0] if isinstance(out, (tuple, list)) and out else out


def _is_chain(calls: list, members: int) -> bool:
    if [index for index, _, _ in calls] != list(range(members)):
        return False
    if any(not isinstance(t, Tensor) for _, x, y in calls for t in (x, y)) or any(x.shape != y.shape for _, x, y in calls):
        return False
    return all(x is y or torch.equal(x, y) for (_, _, y), (_, x, _) in zip(calls, calls[1:]))


def _same(a: Any, b: Any) -> bool:
    """Whether two nests of tuples, lists and dicts are built alike and hold equal tensors."""
    (a, shape), (b, other) = tree_flatten(a), tree_flatten(b)
    return shape == other and all(x is y or isinstance(y, Tensor) and x.shape == y.shape and torch.equal(x, y)
                                  for x, y in zip(a, b) if isinstance(x, Tensor))
