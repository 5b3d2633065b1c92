"""The drift of the quantized model from the dense one, and target weights that make up for it.

Layer errors add up over a model: what a layer reads is no longer what its weights were made for. So two streams of hidden
states run through the blocks, the dense model's and the quantized one's, and each layer is solved not for its own weight W
but for W* = W + D (H + ridge diag H + damping)^-1, the weight that gets nearest to the dense model's values from the quantized
model's inputs.  The ridge keeps W* near W where only the calibration text's correlations speak for more: in other text they are others.
"""
from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import ops, ranks
from .config import Recipe
from .errors import ConfigError, NumericalError
from .hessian import Hessian, finite, packed_size
from .model import (
    Block,
    InputCollector,
    Stop,
    dense_weight,
    fill_up,
    identity,
    in_list,
)
from .model import linears as linears_of
from .ranks import Samples
from .shortcuts import Shortcuts
from .sums import Sums, summed

if TYPE_CHECKING:
    from .stream import BlockStream

_DRIFT = ""             # its sum's name beside those of linears
_ADDITIONS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)


@dataclass(frozen=True)
class Stage:
    """Linears of a block whose inputs are collected in one go, once all that are called before them are quantized.

    aligned: they share one input, called once with a row per token, so the two streams can be compared.  summed: the
    block adds the output of the stage's only linear to something, as to the residual stream; the sum is compared then, and
    the drift of the other summand made up for as well.
    """

    names: tuple[str, ...]
    aligned: bool = False
    summed: bool = False


@dataclass
class Inputs:
    """Of one stage: {linear: Hessian of its inputs}, and the drift, (2 / n) sum_t (v_t - v~_t) x~_t^T over n tokens.

    x~ are the stage's inputs in the quantized stream.  v, v~ are what is compared, in the dense and the quantized stream:
    the inputs themselves, or the sums that the output is added up to.  None where there is nothing to compare.
    """

    hessians: dict[str, Hessian]
    summed: bool = False
    drift: Tensor | None = None

    def target(self, name: str, weight: Tensor, recipe: Recipe) -> Tensor:
        """The weight [rows, cols] to solve the linear `name` for, making up for the recipe's share of the drift."""
        if self.drift is None:
            return weight
        drift = self.drift if self.summed else weight @ self.drift
        try:
            return target_weight(weight, self.hessians[name], drift, recipe)
        except NumericalError as error:
            raise NumericalError(f"{name}: {error}") from None


def target_weight(weight: Tensor, hessian: Hessian, drift: Tensor, recipe: Recipe) -> Tensor:
    """W + share D (H + ridge diag H + damping)^-1; W [rows, cols] and the drift of its output D [rows, cols] are float32."""
    columns = torch.arange(weight.shape[1], device=weight.device)
    U = hessian.factor(("target",), columns, recipe.damp, torch.float32, recipe.ridge).U
    return weight + recipe.compensate * (drift @ U.T @ U)


@torch.no_grad()
def find_stages(block: Block, linears: dict[str, nn.Module], hidden: Tensor) -> list[Stage]:
    """`linears` in the order in which a real call on `hidden` [1, tokens, width] comes to them.

    Members of a ModuleList, of which a token may reach a few only (experts), and linears called never, more than once or on
    other rows than the block's make one stage together, which is not aligned.
    """
    run = _Run(linears)
    with run:
        block(hidden)
    names = [name for name, _, _ in run.calls]
    groups: dict[object, list[str]] = {}
    for name, x, key in run.calls:
        alone = names.count(name) == 1 and not in_list(block, name) and x.shape[:-1].numel() == hidden.shape[:-1].numel()
        members = groups.setdefault(key if alone else None, [])
        if name not in members:
            members.append(name)
    idle = [name for name in linears if name not in names]
    if idle:
        groups.setdefault(None, []).extend(idle)
    return [Stage(tuple(members), key is not None, key is not None and len(members) == 1 and members[0] in run.sums)
            for key, members in groups.items()]


@contextlib.contextmanager
def uncalled(stream: BlockStream) -> Iterator[set[str]]:
    """Filled in at the end: linears that a survey within it did not call, which a run leaves dense.  Experts it quantizes nonetheless."""
    called, found = set(), set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: called.add(module))
    try:
        yield found
    finally:
        handle.remove()
    for block in stream.blocks:
        found |= {full for full, linear in linears_of(block.module, block.name).items() if linear not in called and not in_list(block, full)
                  and not any(full.startswith(expert + ".") for expert in stream.experts[block.name])}


def agreed_stages(names: Sequence[str], stages: list[Stage]) -> list[Stage]:
    """Those that rank 0 found, which has the first sample; they hold each of `names` once."""
    table = torch.zeros(len(names), 4, dtype=torch.int64)
    for row, (i, stage, name) in zip(table, ((i, stage, name) for i, stage in enumerate(stages) for name in stage.names)):
        row.copy_(torch.tensor([i, names.index(name), stage.aligned, stage.summed]))
    members: dict[tuple, list[str]] = {}
    for i, name, aligned, summed_up in ranks.agree(table).tolist():
        members.setdefault((i, bool(aligned), bool(summed_up)), []).append(names[name])
    return [Stage(tuple(found), aligned, summed_up) for (_, aligned, summed_up), found in members.items()]


@torch.no_grad()
def run_dense(block: Block, stages: list[Stage], linears: dict[str, nn.Module], dense: list[Tensor], device: torch.device,
              new: Callable[[], list[Tensor]] = list,
              scratch: Callable[[], list[Tensor]] = list) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """Runs the dense stream through a block that is still dense -> (its outputs, what aligned stages are compared with).

    The latter, [1, tokens, ..] per sample under the name of the stage's first linear, are about as large as the hidden
    states each, and are kept where those are.  `new` and `scratch` make the lists for the two.
    """
    outputs, wanted = new(), {stage.names[0]: scratch() for stage in stages if stage.aligned}
    summed = {stage.names[0] for stage in stages if stage.summed}
    for state in dense:
        run = _Run({name: linears[name] for name in wanted}, copies=True)
        with run:
            outputs.append(block(state.to(device)).to(state.device))
        inputs = {name: x for name, x, _ in run.calls}
        for name, kept in wanted.items():
            kept.append(_seen(name, run.sums if name in summed else inputs).to(state.device))
    return outputs, wanted


@torch.no_grad()
def collect(stage: Stage, linears: dict[str, nn.Module], block: Block, hidden: Sequence[Tensor], wanted: dict[str, list[Tensor]],
            device: torch.device, samples: Samples | None = None, weights: Tensor | None = None,
            shortcuts: Shortcuts | None = None) -> Inputs:
    """Runs the quantized stream `hidden` through `block` and compares it with the `wanted` of the dense one.

    linears: those of the stage.  Runs of an aligned stage end as soon as they have given what is compared.  samples: the share that
    `hidden` is, where ranks share the samples; the sums are over all of them.  weights: by which each token counts in an aligned stage,
    [all samples, tokens], of mean 1.  shortcuts: of the block, for what runs have in common.
    """
    shortcuts = shortcuts or Shortcuts(block)
    samples = Samples(len(hidden)) if samples is None else samples
    if not stage.aligned:
        cols = {full: dense_weight(linear).shape[1] for full, linear in linears.items()}

        def inputs_of(places: range) -> Sums:
            with InputCollector(linears, device) as inputs:
                for place in places:
                    shortcuts(place, hidden[place].to(device))
                    inputs.next_sample()
            return Sums.of(inputs.leader, inputs.hessians)

        total = summed(samples, {full: packed_size(width) for full, width in cols.items()}, device, inputs_of)
        return Inputs(fill_up(block, total.hessians(cols, device)))
    leader = stage.names[0]
    rows, cols = dense_weight(linears[leader]).shape
    compared, shape = wanted.pop(leader), (rows if stage.summed else cols, cols)

    def drift_of(places: range) -> Sums:
        hessian, drift = Hessian(cols, device), torch.zeros(shape, device=device)
        for place in places:
            run = _Run({leader: linears[leader]}, until="sum" if stage.summed else "input")
            try:
                with run:
                    shortcuts(place, hidden[place].to(device))
            except Stop:
                pass
            x = run.calls[0][1]
            shortcuts.keep(leader, x.to(hidden[place].device))
            have = _seen(leader, run.sums) if stage.summed else x
            change = _rows(compared[place].to(device) - have)
            if weights is not None:
                root = weights[samples.first + place].to(device).sqrt()[:, None]
                x, change = root * _rows(x), root * change
            counted, sound = hessian.add(x), finite(change)
            if counted is not None and sound is not None:
                ops.cross(drift, sound[0], counted)
        found = Sums.of({leader: leader}, {leader: hessian})
        found.put(_DRIFT, drift.view(-1))
        return found

    total = summed(samples, {leader: packed_size(cols), _DRIFT: math.prod(shape)}, device, drift_of)
    drift = total.flats[_DRIFT].to(device).view(shape)
    hessian = total.hessians({leader: cols}, device)[leader]
    return Inputs(dict.fromkeys(stage.names, hessian), stage.summed, drift * (2 / max(hessian.tokens, 1)))


def _rows(x: Tensor) -> Tensor:
    """[tokens, width]."""
    return x.reshape(-1, x.shape[-1])


def _seen(name: str, found: dict[str, Tensor]) -> Tensor:
    if name not in found:
        raise ConfigError(f"{name}: the block calls it in another way than on the first sample; quantize with Recipe(compensate=0)")
    return found[name]


class _Run(TorchDispatchMode):
    """Hooks on `linears` while their block runs: `calls` are (name, input, its identity) in order.

    `sums` are {name: its output plus another tensor} where that addition is the first that happens to the output; it
    stops the block's call at the first "input" or "sum" if told so.  `copies` outlive the block's changes to them.
    """

    def __init__(self, linears: dict[str, nn.Module], until: str = "", copies: bool = False):
        super().__init__()
        self.linears, self.until, self.copies = linears, until, copies
        self.calls: list[tuple[str, Tensor, tuple]] = []
        self.sums: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}           # not read yet
        self._handles: list = []

    def __enter__(self) -> _Run:
        for name, linear in self.linears.items():
            self._handles += [linear.register_forward_pre_hook(lambda m, args, name=name: self._called(name, args[0])),
                              linear.register_forward_hook(lambda m, args, out, name=name: self._outputs.__setitem__(name, out))]
        return super().__enter__()

    def __exit__(self, *exception) -> None:
        for handle in self._handles:
            handle.remove()
        super().__exit__(*exception)

    def _called(self, name: str, x: Tensor) -> None:
        self.calls.append((name, x.clone() if self.copies else x, identity(x)))
        if self.until == "input":
            raise Stop

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)] if self._outputs else []
        for name in [name for name, out in self._outputs.items() if any(_shares(t, out) for t in read)]:
            if func in _ADDITIONS and not kwargs and len(read) == 2 and read[0].shape == read[1].shape and not _shares(*read):
                self.sums[name] = result.clone() if self.copies else result
                if self.until == "sum":
                    raise Stop
            elif isinstance(result, Tensor) and _shares(result, self._outputs[name]) and not func._schema.is_mutable:
                continue                                # only a view of it
            # Whatever comes later may depend on the output, and is no summand that it could make up for.
            del self._outputs[name]
        return result


def _shares(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
