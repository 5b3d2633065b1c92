"""The output head and the embedding of a language model.

An embedding is quantized before the blocks, which then make up for its errors, and a head behind them, for what comes out of them; one
weight that is both before them, for what the dense model's blocks give.
"""
from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import ops, ranks
from .config import Recipe, VQConfig
from .drift import Stage, collect
from .embedding import put_embedding, put_head, scale_of
from .errors import ConfigError
from .hessian import Hessian, wide
from .job import Run
from .linear import VQLinear
from .model import Block, InputCollector, Stop, call
from .problem import gs_of, in_units, unit_of
from .ranks import Samples
from .scaling import block_sizes, scale_norm, scale_range, scale_reach
from .solver import LayerRecord, solve
from .spec import TILE_ROWS, QuantSpec
from .storage import digest_of
from .stream import BlockStream
from .weight import VQWeight

_LEAST_PART = 1 << 22       # weights
_TOKENS = 8192              # that a tied head is solved for


@dataclass
class Head(Block):
    """lm_head as one more block: called with hidden states behind the last block, it ends where its linear has seen its input.

    `embedding` is the full name of the embedding, where it can be packed, and `tied` whether it shares the head's weight; `most` how many
    weights are solved at once.
    """

    model: nn.Module = None
    blocks: Sequence[Block] = ()
    embedding: str | None = None
    tied: bool = False
    most: int = 0

    def specs(self, config: VQConfig) -> dict[str, QuantSpec]:
        """{layer: spec} of the head, and of an embedding with a weight of its own."""
        names = [self.name] + [self.embedding] * bool(self.embedding and not self.tied)
        return {name: VQConfig.preset(config.head).spec(*self.model.get_submodule(name).weight.shape, name) for name in names}

    @property
    def front(self) -> str | None:
        """What is quantized before the blocks, if anything."""
        return self.name if self.tied else self.embedding

    def __call__(self, hidden: Tensor) -> None:
        with skipped(self.blocks, hidden.to(self.module.weight.device)):
            self.reach(torch.zeros(hidden.shape[:2], dtype=torch.int64))

    def reach(self, tokens: Tensor) -> None:
        """Calls the model on tokens [samples, n] until its head has seen its input."""
        def stop(module, args):
            raise Stop

        handle = self.module.register_forward_pre_hook(stop)        # behind those that are there already
        try:
            call(self.model, tokens)
        except Stop:
            return
        finally:
            handle.remove()
        raise ConfigError(f"{self.name}: the model did not call it; leave it dense (head=\"\")")


def find_head(stream: BlockStream) -> Head:
    """Raises ConfigError for a model whose head cannot be packed."""
    model, names = stream.model, {id(module): name for name, module in stream.model.named_modules()}
    head, embedding = (getattr(model, f"get_{kind}_embeddings", lambda: None)() for kind in ("output", "input"))
    if type(head) is not nn.Linear:
        raise ConfigError(f"head: {type(model).__name__} has {'no' if head is None else f'a {type(head).__name__} as its'} output head, need "
                          "an nn.Linear; leave it dense (head=\"\", no --head)")
    name, tied = names[id(head)], getattr(embedding, "weight", None) is head.weight
    if tied and not _is_lookup(embedding):
        raise ConfigError(f"head: {name} is tied to {names[id(embedding)]}, whose {type(embedding).__name__} does more than look rows up and "
                          "scale them; leave it dense (head=\"\", no --head)")
    packable = embedding is not None and (tied or isinstance(embedding, nn.Embedding) and _is_lookup(embedding))
    for each in (head, embedding) if packable else (head,):
        stream.weight_bytes[names[id(each)]] = each.weight.numel() * each.weight.element_size()
    # A head is many times as large as any other linear; in parts like those it takes no more memory than they do.
    most = max([_LEAST_PART, *(rows * cols for rows, cols in stream.shapes.values())])
    return Head(name, head, model=model, blocks=stream.blocks, embedding=names[id(embedding)] if packable else None, tied=tied, most=most)


def solve_tied(head: Head, specs: dict[str, QuantSpec], tokens: Tensor, stream: BlockStream, run: Run) -> VQWeight:
    """The weight of a head that is the embedding too, solved for the head's inputs in the dense model, on some of `tokens` [samples, n]."""
    if (kept := run.kept_front()) is not None:
        return kept
    some = tokens[: max(_TOKENS // tokens.shape[1], 1)]
    run.progress.stage("collecting Hessians")
    with run.timed("hessians"), stream.dense(run.device), InputCollector({head.name: head.module}, run.device) as inputs:
        head.reach(some)
    return _solved(head, head.name, inputs.hessian(head.name), specs, run, 0)


def quantize_embedding(head: Head, specs: dict[str, QuantSpec], run: Run) -> None:
    """Solves an embedding with a weight of its own, all of whose columns count the same, and puts it in its place."""
    if (vq := run.kept_front()) is None:
        hessian = Hessian.from_matrix(torch.eye(specs[head.embedding].cols, device=run.device))
        vq = _solved(head, head.embedding, hessian, specs, run, 0)
    put_embedding(head.model, head.embedding, vq)


def quantize_head(head: Head, specs: dict[str, QuantSpec], hidden: Sequence[Tensor], samples: Samples, run: Run) -> None:
    """Solves a head with a weight of its own for the `hidden` states behind the last block, and puts it in its place."""
    run.progress.stage("collecting Hessians")
    with run.timed("hessians"):
        hessian = collect(Stage((head.name,)), {head.name: head.module}, head, hidden, {}, run.device, samples).hessians[head.name]
    install(head, _solved(head, head.name, hessian, specs, run, len(run.report.layers)))


def install(head: Head, vq: VQWeight) -> None:
    """Puts a packed head in its place, and the embedding that is tied to it."""
    packed = VQLinear.from_weight(vq, head.module.bias, head.name).to(head.module.weight.device)
    put_head(head.model, head.name, packed, head.embedding if head.tied else None)


def _solved(head: Head, name: str, hessian: Hessian, specs: dict[str, QuantSpec], run: Run, at: int) -> VQWeight:
    """at: the record's place in the report; in front of those that a journal has, if it is solved before them."""
    if hessian.dropped:
        run.note(f"{name}: {hessian.dropped} calibration tokens gave non-finite activations and were left out")
    run.progress.stage(f"solving {name}")
    with run.timed("solve"):
        vq, record = solve_parts(head.model.get_submodule(name).weight, hessian, specs[name], run.config.recipe, name, head.most, run.device)
    if record.repair:
        run.fallback(f"{name}: its Hessian took a repair: {record.repair}")
    run.report.layers.insert(at, record)
    run.progress.layer(record)
    return vq


def _is_lookup(embedding: nn.Module) -> bool:
    """Whether a TiedEmbedding gives what it does."""
    weight, ids = embedding.weight, torch.arange(min(8, len(embedding.weight)), device=embedding.weight.device)
    rows = weight[ids] * torch.full((), scale_of(embedding), dtype=weight.dtype, device=weight.device)
    return isinstance(embedding, nn.Embedding) and torch.equal(embedding(ids), rows)


def solve_parts(weight: Tensor, hessian: Hessian, spec: QuantSpec, recipe: Recipe, name: str, most: int,
                device: torch.device) -> tuple[VQWeight, LayerRecord]:
    """`solver.solve` of at most so many weights at a time, whole groups and tiles of rows, where the format allows it.

    Block scales are those of the whole layer.  In parts, of the stages that a part went through the best counts there.
    """
    step = math.lcm(spec.group_rows, TILE_ROWS)
    rows = max(most // (step * spec.cols), 1) * step
    together = ranks.size() > 1
    # SVD codebooks tie all groups together, and left to right a strip's scales depend on the strips before it.
    if rows >= spec.rows or spec.svd_rank or spec.scale_block and recipe.order == "sequential":
        return solve(weight.to(device).float(), hessian, spec, recipe, name, together)
    weight = wide(weight) if weight.element_size() == 1 else weight
    unit = unit_of(weight, name)
    pieces, scales = weight.split(rows), None
    if spec.scale_block:
        norm = scale_norm(spec, recipe.method)
        log = torch.cat([block_sizes(in_units(piece, unit, torch.float32), spec.scale_block, norm) for piece in pieces])
        scales = tuple(bound.to(device) for bound in scale_range(log, scale_reach(recipe.method)))
    solved, losses, power = [], Counter(), 0.0
    for piece in pieces:
        piece = in_units(piece.to(device), unit, torch.float32)
        vq, record = solve(piece, hessian, dataclasses.replace(spec, rows=len(piece), group_rows=min(spec.group_rows, len(piece))), recipe,
                           name, together, scales)
        own = float((ops.matmul(piece, hessian.matrix()).double() * piece).sum())
        power += own
        losses.update({"": own * record.error, **{stage: own * error for stage, error in record.stages.items()}})
        solved.append((vq, record))
    record, power = solved[0][1], power or 1.0
    buffers = {key: torch.cat([vq.buffers[key] for vq, _ in solved]) for key in solved[0][0].buffers if key != "sz"}
    buffers["gs"] = gs_of(buffers["gs"], unit)
    vq = VQWeight(spec, buffers | ({"sz": solved[0][0].buffers["sz"]} if scales else {}))
    return vq, dataclasses.replace(record, spec=spec, error=losses[""] / power, stages={key: losses[key] / power for key in record.stages},
                                   seconds=sum(each.seconds for _, each in solved), sha256=digest_of(vq.buffers.values()))


@contextlib.contextmanager
def skipped(blocks: Sequence[Block], hidden: Tensor) -> Iterator[None]:
    """Within it the blocks give `hidden`, whatever they are called with."""
    before = [block.module.__dict__.get("forward") for block in blocks]
    for block in blocks:
        block.module.forward = lambda *args, block=block, **kwargs: (hidden,) if block.in_tuple else hidden
    try:
        yield
    finally:
        for block, forward in zip(blocks, before):
            del block.module.forward
            if forward is not None:
                block.module.forward = forward
