"""quantize(): a whole model, one straight loop over its decoder blocks."""
from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from . import checkpoint, ranks
from .calibration import calibration_windows, describe, require_usable, tokens_sha256
from .check import compare, held_out_tokens
from .config import DEFAULT_PRESET, VQConfig
from .distill import distill_block, learning_bytes, require_learnable
from .drift import Stage, agreed_stages, collect, find_stages, run_dense
from .errors import ConfigError, NumericalError
from .head import Head, find_head, install, quantize_embedding, quantize_head, solve_tied
from .job import Run
from .linear import VQLinear
from .machine import trim_memory
from .model import Block, dense_weight, embed, in_list
from .problem import working_bytes
from .ranks import Samples
from .report import Progress, Report
from .shortcuts import Shortcuts
from .solver import solve
from .spec import LAYOUT_VERSION, QuantSpec
from .storage import TensorList
from .stream import Activations, BlockStream, open_stream
from .token_weights import loss_gradients, stage_weights
from .weight import VQWeight


def quantize(model: str | os.PathLike | nn.Module, out: str | os.PathLike | None, config: VQConfig | str = DEFAULT_PRESET, *,
             calibration, samples: int = 128, sequence_length: int = 2048, device=None, dtype="auto", overwrite: bool = False,
             resume: str = "auto", redo: str | Sequence[str] = (), check="auto", strict: bool = False,
             progress: Progress | None = None, tokenizer=None) -> Report:
    """Quantizes every linear in the decoder blocks of `model` and writes a packed checkpoint into the folder `out`.

    model: a folder, a hub id, a .gguf file, or a module, which is changed in place and for text calibration needs
    `tokenizer`.  out: a new or empty folder (`overwrite` replaces a checkpoint in it), or None to keep the result in memory.
    config: a VQConfig or a preset's name.  calibration: text, a path, a dataset's name, strings, or ids [samples, tokens].
    device: where blocks run and are solved, one at a time; None is the GPU where there is one.  dtype: to load the model in.
    resume: "auto" keeps a journal in `out`, and the same call goes on behind the last finished block; "fresh" starts over;
    "never" keeps none.  redo: names or patterns of layers of the finished checkpoint in `out`, or "weak", to do again.
    check: text or ids on which the saved model is compared with the dense one; "auto" is calibration text that was not used,
    None does without.  strict: whatever would be a warning or a repair in the report is an error.
    Memory: of a folder's model one block at a time; two hidden states of every calibration token (the dense model's and the
    quantized one's) and, for the block at hand, about five more, in files where they are large.  `Recipe(compensate=0)`
    needs only one; `Recipe(token_weights="loss")` needs the whole model, and `Recipe(distill=1)` a block, with the activations of one
    sample.  The report holds the quantized model (`.model`, runs at once) and the tokenizer.
    Where torch.distributed is initialized, all its processes make this call with the same arguments and share the work; `out` is
    one folder that all of them see.  The result is the same as of one process, on CPUs byte by byte; on GPUs products of other
    sizes may be summed in another order.
    Raises ConfigError for unusable arguments, before any work, ResumeMismatch where `out` holds another job, NumericalError
    for non-finite weights or activations, and GptvqError under `strict`.
    """
    from .hf import pick_device

    config = VQConfig.preset(config) if isinstance(config, str) else config
    if not isinstance(config, VQConfig):
        raise ConfigError(f"config: got {type(config).__name__}, need a VQConfig or a preset's name")
    if config.recipe.distill and ranks.size() > 1:
        raise ConfigError(f"distill: got {ranks.size()} processes, the codebooks of a block learn in one; start one, or leave distill at 0")
    run = Run(config, pick_device(device), resume, (redo,) if isinstance(redo, str) else tuple(redo), strict, overwrite,
              progress if progress and not ranks.rank() else Progress())
    new = out is not None and not ranks.rank() and not Path(out).exists()
    try:
        run.claim(out, model)
        return _quantize(model, run, calibration, samples, sequence_length, dtype, check, tokenizer)
    except BaseException:
        run.give_up()
        if new and run.folder is not None and run.folder.is_dir() and not any(run.folder.iterdir()):
            run.folder.rmdir()
        raise


@torch.inference_mode(False)       # whose tensors do not tell whether they were changed
@torch.no_grad()
def _quantize(source, run: Run, calibration, samples, sequence_length, dtype, check, tokenizer) -> Report:
    config, device, progress = run.config, run.device, run.progress
    report = run.open_report()
    progress.stage("loading the model")
    with run.timed("load"):
        stream = open_stream(source, dtype, tokenizer, whole=bool(config.recipe.token_weights))
        if run.folder is not None and not hasattr(stream.model, "config"):
            raise ConfigError(f"{stream.name}: only Hugging Face models can be written to a folder; pass out=None")
        tokens, unused = calibration_windows(calibration, stream.tokenizer, samples, sequence_length, config.seed)
        require_usable(stream.model, tokens)
        held_out = held_out_tokens(run, check, unused, calibration, stream, tokens.shape[1])
    progress.stage("reading the whole model once")
    with run.timed("survey"):
        stream.survey(tokens[:1], device)
        trim_memory()
    specs = config.resolve(stream.shapes)
    stream.require_finite(specs)
    if config.recipe.distill:
        require_learnable(specs)
    head = find_head(stream) if config.head else None
    specs |= head.specs(config) if head is not None else {}
    report.model_name, report.tokenizer = stream.name, stream.tokenizer
    report.calibration = {"source": describe(calibration), "samples": tokens.shape[0], "sequence_length": tokens.shape[1],
                          "tokens": tokens.numel(), "sha256": tokens_sha256(tokens)}
    complete = run.begin(stream, specs, report, head.front if head is not None else None)
    wanted = None
    if held_out is not None and not ranks.rank() and run.report.check.get("sha256") != tokens_sha256(held_out):
        with run.timed("check"):
            wanted = stream.logits(held_out, device)
    if not complete:
        gradients = _loss_gradients(stream, run, specs, tokens)
        tied = solve_tied(head, specs, tokens, stream, run) if head is not None and head.tied else None
        run.take_over(stream)                                   # from here on the model is no longer the dense one
        with stream.reading_ahead(device):
            hidden, samples = _quantize_blocks(stream, run, specs, tokens, gradients, head, tied)
        if head is not None and not head.tied:
            quantize_head(head, specs, hidden, samples, run)
        _describe(stream, run, head)
        run.finish(stream)
    report = run.report
    if wanted is not None:
        compare(run, wanted, held_out)
    progress.finish(report)
    return report


def _loss_gradients(stream: BlockStream, run: Run, specs: dict[str, QuantSpec], tokens: Tensor) -> dict[str, Tensor]:
    """{linear: [samples, n]} of the dense model, if the recipe weighs tokens by them."""
    if not run.config.recipe.token_weights:
        return {}
    names = [name for name in specs if name in stream.shapes]           # no head: it is called behind the blocks

    def tell(done: int, of: int) -> None:
        if done == of or done % -(-of // 10) == 0:                  # ten lines where each is printed
            run.progress.stage(f"weighing the calibration tokens: {done} of {of} sequences")

    run.progress.stage("weighing the calibration tokens")
    with run.timed("weights"):
        found = loss_gradients(stream.model, stream.blocks, names, tokens, run.device, tell)
    for name in (name for name in names if name not in found):
        run.note(f"{name}: sees only some of the tokens, which all count the same")
    return found


def _quantize_blocks(stream: BlockStream, run: Run, specs: dict[str, QuantSpec], tokens: Tensor,
                     gradients: dict[str, Tensor], head: Head | None, tied: VQWeight | None) -> tuple[Sequence[Tensor], Samples]:
    """Every block that is not done yet: solves its linears, runs both streams through it, and puts it into the journal.

    tied: the packed weight of a head that is the embedding too.  Returns the quantized stream behind the last block, of this rank's samples.
    """
    recipe, device, progress, blocks = run.config.recipe, run.device, run.progress, stream.blocks
    example = embed(stream.model, blocks, tokens[:1])[0]
    samples = Samples(len(tokens), ranks.size() > 1)
    activations = Activations(run.journal, samples, example.numel() * example.element_size(), device)
    if run.folder is not None and not run.done:
        checkpoint.require_space(run.folder, stream.nbytes - sum(stream.weight_bytes[name] for name in specs)
                                 + sum(spec.nbytes for spec in specs.values()) * (2 if run.journal else 1)
                                 + activations.disk_bytes)
    behind = tuple(block.name + "." for block in blocks[: max(run.done, run.redo.first if run.redo else 0)])
    todo = [name for name in specs if not name.startswith(behind) and (tied is None or name != head.name) and not run.keeps(name)]
    progress.start(sum(specs[name].rows * specs[name].cols for name in todo), len(blocks))
    if run.done:
        hidden = activations.stored("hidden", run.done - 1)
        dense = activations.stored("dense", run.done - 1) if recipe.compensate else []
        ranks.wait()                                            # before somebody replaces them
    else:
        hidden = _embedded(stream, run, activations, tokens)
        dense = hidden if recipe.compensate else []             # as `hidden`, but of the dense model
    if head is not None and head.embedding:
        install(head, tied) if head.tied else quantize_embedding(head, specs, run)
        if not run.done:
            hidden = _embedded(stream, run, activations, tokens)
    for index, block in enumerate(blocks[run.done:], run.done):
        progress.block(index, block.name)
        with run.timed("load"):
            linears = {full: linear for full, linear in stream.load(block).items() if full in specs}
        home = torch.device("cpu") if stream.streamed else next(block.module.parameters()).device
        block.to(device)
        if index + 1 < len(blocks):
            own = [specs[full] for full in linears]
            stream.read_ahead(blocks[index + 1], working_bytes(own) + (learning_bytes(own) if recipe.distill else 0), device)
        packed, kept, shortcuts = {}, run.kept(index, linears), Shortcuts(block)
        order, compared = [Stage(tuple(linears))] if kept is None else [], {}
        if recipe.compensate:
            progress.stage("running the dense block")
            with run.timed("forward"):
                if kept is None:
                    order = agreed_stages(list(linears), [] if ranks.rank() else find_stages(block, linears, hidden[0].to(device)))
                    shortcuts = Shortcuts.find(block, order, linears, hidden, device, activations.scratch)
                dense, compared = run_dense(block, order, linears, dense, device, lambda: activations.new("dense", index),
                                            activations.scratch)
        for stage in order:
            packed |= _solve_stage(stage, block, linears, hidden, compared, shortcuts, samples, specs, stream, run, gradients)
        if recipe.distill and packed:
            shortcuts = Shortcuts(block)                        # what others keep will not be so any more
            packed = distill_block(block, packed, hidden, dense, run)
        if kept is not None:
            run.redo.restore(block.module, block.name)
        for full, record in (kept or {}).items():
            packed[full] = VQLinear.from_weight(run.redo.weight(full), linears[full].bias, full).to(device)
            run.report.layers.append(record)
            stream.model.set_submodule(full, packed[full].to_dense(linears.pop(full).weight.dtype))
        progress.stage("running the quantized block")
        with run.timed("forward"):
            before, hidden, sound = hidden, activations.new("hidden", index), []
            for place, state in enumerate(before):
                out = shortcuts(place, state.to(device))
                sound.append(torch.isfinite(out).all())
                hidden.append(out.to(state.device))
            _require_finite(block, hidden, sound, samples.first)
            del before, shortcuts                               # the next block's lists need the room
        for full, linear in packed.items():
            stream.model.set_submodule(full, linear)
        block.to(home)
        block.args, block.kwargs = (), {}
        if run.journal is not None:
            progress.stage("writing the journal")
            with run.timed("journal"):
                run.commit(index, block, {kind: activations.whole(kind, index, states) for kind, states in
                                          (("hidden", hidden), ("dense", dense))[: 2 if recipe.compensate else 1]})
            stream.release(block)
        trim_memory()
    return hidden, samples


def _embedded(stream: BlockStream, run: Run, activations: Activations, tokens: Tensor) -> list[Tensor] | TensorList:
    """What enters the first block, of this rank's samples."""
    run.progress.stage("embedding the calibration samples")
    own = tokens[activations.samples.first: activations.samples.last]
    with run.timed("embed"):
        return activations.at_home(embed(stream.model, stream.blocks, own, activations.scratch))


def _solve_stage(stage: Stage, block: Block, linears: dict[str, nn.Module], hidden, compared, shortcuts: Shortcuts, samples: Samples,
                 specs: dict[str, QuantSpec], stream: BlockStream, run: Run, gradients: dict[str, Tensor]) -> dict[str, VQLinear]:
    """Quantizes the linears of a stage and puts the values they have now in their places -> the packed ones."""
    packed, recipe, progress = {}, run.config.recipe, run.progress
    progress.stage("collecting Hessians")
    with run.timed("hessians"):
        inputs = collect(stage, {full: linears[full] for full in stage.names}, block, hidden, compared, run.device, samples,
                         stage_weights(gradients, stage.names), shortcuts)
    for full in stage.names:
        linear, hessian = linears[full], inputs.hessians[full]
        if hessian.dropped:
            run.note(f"{full}: {hessian.dropped} of {hessian.tokens + hessian.dropped} calibration tokens gave non-finite activations and "
                     "were left out")
        if hessian.tokens + hessian.dropped == 0:
            if not any(full.startswith(expert + ".") for expert in stream.experts[block.name]) and not in_list(block, full):
                run.note(f"{full}: never called in the calibration runs, left dense")
                continue
            how = "for those that other experts saw" if hessian.borrowed else "without them"
            run.note(f"{full}: saw no calibration tokens, quantized {how}; more samples would help")
        progress.stage(f"solving {full}")
        with run.timed("solve"):
            weight = inputs.target(full, dense_weight(linear).float(), recipe)
            vq, record = solve(weight, hessian, specs[full], recipe, full, ranks.size() > 1)
        if record.repair:
            run.fallback(f"{full}: its Hessian took a repair: {record.repair}")
        packed[full] = VQLinear.from_weight(vq, linear.bias, full)
        run.report.layers.append(record)
        progress.layer(record)
        # The same values unpacked once, not again for every sample.
        stream.model.set_submodule(full, packed[full].to_dense(linear.weight.dtype))
        del linears[full]
    return packed


def _describe(stream: BlockStream, run: Run, head: Head | None) -> None:
    """The totals of the report, and the settings of the quantized model."""
    from .hf import attach

    report = run.report
    quantized = {record.name: record.spec.to_dict() for record in report.layers}
    report.dense_bytes = sum(stream.weight_bytes[name] for name in quantized)
    report.other_bytes = stream.nbytes - report.dense_bytes
    if hasattr(stream.model, "config"):
        attach(stream.model, {
            "version": checkpoint.VERSION, "layout_version": LAYOUT_VERSION, "config": run.config.to_dict(), "layers": quantized,
            "bits_per_value": report.bits_per_value, "calibration": report.calibration,
            "experts": [name for block in stream.blocks for name in stream.experts[block.name]],
            **({"tied": {head.embedding: head.name}} if head is not None and head.tied else {})})
    if stream.streamed and run.journal is not None:
        report.folder = run.folder                              # the model is read back when somebody asks for it
    else:
        report.model = stream.model


def _require_finite(block: Block, hidden, sound: list[Tensor], first: int) -> None:
    """sound: for each of the samples in `hidden`, from `first` on, whether it is finite, looked at once for all of them."""
    for place, good in enumerate(torch.stack(sound).tolist() if sound else []):
        if not good:
            raise NumericalError(f"{block.name}: its output holds {int((~torch.isfinite(hidden[place])).sum())} non-finite activations in "
                                 f"calibration sample {first + place}; the source checkpoint is damaged or its dtype overflowed, try dtype "
                                 "float32")
