"""Runs of a block that leave out what earlier ones have computed: a module that ends in a linear whose input is known by now."""
from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .model import Block, dense_weight, identity

if TYPE_CHECKING:
    from .drift import Stage

_MOVED = 2              # times the width of the hidden states: what is worth moving to where they are and back, not to compute it again
_PLAIN = (bool, int, float, str, type(None))


@dataclass
class _Part:
    """A module inside the block whose output is that of its `linear`, by itself or before Nones in a tuple of `length`."""

    module: nn.Module
    linear: str
    length: int
    inputs: Any = field(default_factory=list)           # of the linear, a sample each

    def instead(self, x: Tensor):
        out = self.module.get_submodule(self.linear)(x)
        return (out, *[None] * (self.length - 1)) if self.length else out


class Shortcuts:
    """Runs `block` for a calibration sample, without the modules whose outputs are known but for their last linear.

    Attention, mostly: once the linears before the output projection are quantized, what that projection reads does not change any more,
    and whatever it is replaced by can be applied to that.  Outputs are the same to the bit.
    """

    def __init__(self, block: Block, parts: dict[str, _Part] | None = None):
        self.block, self._parts = block, parts or {}

    @classmethod
    @torch.no_grad()
    def find(cls, block: Block, stages: Sequence[Stage], linears: dict[str, nn.Module], hidden: Sequence[Tensor], device: torch.device,
             new: Callable[[], Any] = list) -> Shortcuts:
        """By one call on the first of the samples `hidden`, [1, tokens, width] each, if any.  `new` makes the lists for what is kept.

        A stage of one linear gives one where the module around it returns that linear's output, takes no objects that it could change
        (such as caches) and changes no tensor that it is given, no linear called before belongs to a later stage, and what the linear
        reads is contiguous: products of other tensors need not be the same to the bit once those have been stored.  What is kept takes
        no more room than what the stages before are compared with, which is gone by then, and one list of hidden states.
        """
        if not len(hidden):
            return cls(block)
        example = hidden[0].to(device)
        earlier: set[str] = set()
        watched: list[tuple[_Watched, set[str], int]] = []
        width = room = example.shape[-1]
        most = math.inf if hidden[0].device == example.device else _MOVED * width
        for stage in stages:
            name, around = stage.names[0], stage.names[0].rpartition(".")[0]
            if stage.aligned:
                rows, cols = dense_weight(linears[name]).shape
                if len(stage.names) == 1 and around.startswith(block.name + "."):
                    watched.append((_Watched(name, block.module.get_submodule(around[len(block.name) + 1:]), linears), set(earlier), room))
                room += rows if stage.summed else cols
            earlier |= set(stage.names)
        with contextlib.ExitStack() as hooks:
            for one, *_ in watched:
                hooks.enter_context(one)
            if watched:
                block(example)
        parts, taken = {}, 0
        for one, solved, room in watched:
            cols = dense_weight(linears[one.name]).shape[1]
            if one.length is not None and set(one.before) <= solved and taken + cols <= min(room, most):
                parts[one.name] = _Part(one.module, one.name.rpartition(".")[2], one.length, new())
                taken += cols
        return cls(block, parts)

    def keep(self, name: str, x: Tensor) -> None:
        """x: what the linear `name` reads of the next sample, and of that one from now on for good."""
        if not x.is_contiguous():
            self._parts.pop(name, None)
        if name in self._parts:
            self._parts[name].inputs.append(x.clone())

    def __call__(self, place: int, hidden: Tensor) -> Tensor:
        """The block's output for sample number `place`, `hidden` [1, tokens, width]."""
        known = [(part, part.inputs[place].to(hidden.device), part.module.__dict__.get("forward"))
                 for part in self._parts.values() if place < len(part.inputs)]
        try:
            for part, x, _ in known:
                part.module.__dict__["forward"] = lambda *args, part=part, x=x, **kwargs: part.instead(x)
            return self.block(hidden)
        finally:
            for part, _, forward in known:
                part.module.__dict__.pop("forward", None)
                if forward is not None:
                    part.module.__dict__["forward"] = forward


class _Watched:
    """Hooks while a block runs: `before`, the linears called before `name`, and `length` as of a _Part if there can be one."""

    def __init__(self, name: str, module: nn.Module, linears: dict[str, nn.Module]):
        self.name, self.module, self.linears = name, module, linears
        self.before: list[str] = []
        self.length: int | None = None
        self._calls, self._sound, self._output, self._given = 0, True, None, []
        self._handles: list = []

    def __enter__(self) -> _Watched:
        self._handles = [
            *(linear.register_forward_pre_hook(lambda m, args, name=name: self._called(name)) for name, linear in self.linears.items()),
            self.linears[self.name].register_forward_hook(lambda m, args, out: self._gave(args[0], out)),
            self.module.register_forward_pre_hook(lambda m, args, kwargs: self._takes((*args, *kwargs.values())), with_kwargs=True),
            self.module.register_forward_hook(lambda m, args, out: self._returned(out))]
        return self

    def __exit__(self, *exception) -> None:
        for handle in self._handles:
            handle.remove()

    def _called(self, name: str) -> None:
        if name != self.name and self._output is None:
            self.before.append(name)

    def _gave(self, x: Tensor, out: Tensor) -> None:
        self._sound &= x.is_contiguous()
        self._output = out, identity(out)

    def _takes(self, arguments: tuple) -> None:
        for argument in arguments:
            if type(argument) is tuple:
                self._takes(argument)
            elif isinstance(argument, Tensor):
                self._given.append((argument, argument._version))
            else:
                self._sound &= isinstance(argument, _PLAIN)

    def _returned(self, result: Any) -> None:
        self._calls += 1
        first, rest = (result[0], result[1:]) if type(result) is tuple and result else (result, ())
        same = self._output is not None and isinstance(first, Tensor) and identity(first) == self._output[1]
        unchanged = all(tensor._version == version for tensor, version in self._given)
        sound = self._sound and same and unchanged and self._calls == 1 and all(other is None for other in rest)
        self.length = (len(result) if type(result) is tuple else 0) if sound else None
