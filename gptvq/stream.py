"""A model as a stream of decoder blocks, and the hidden states between them: in memory one block at a time."""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from . import ops, ranks
from .ahead import ReadAhead
from .checkpoint import unique_tensors
from .errors import FormatError, NumericalError
from .journal import Journal
from .linear import VQLinear
from .machine import available_memory
from .model import (
    Block,
    call,
    dense_weight,
    find_blocks,
    linears,
    record_calls,
    run_on,
    unfuse_experts,
)
from .ranks import Samples
from .solver import LayerRecord
from .storage import TensorList, digest
from .weight import VQWeight

_COMMITTED = 4      # lists of hidden states in the journal at one time: both streams, before and behind a block
_STREAMS = 7        # of both streams, before a block and the dense one behind it, and of what is compared within it, or kept once it has been
_IN_FILES = 8       # .. where all of them are in files: both streams, before and behind a block, and what is compared or kept
_CHUNK = 1 << 24    # numbers that are looked at at once: what that takes is small beside an embedding


class BlockStream:
    """The blocks of `model`, whose weights are loaded when a block's turn comes and released after it.

    Modules handed in, GGUF files and what cannot be read in parts are in memory as a whole; `load` and `release` do nothing.
    `survey` fills in the rest: `blocks` with the arguments of their calls, {linear: (rows, cols)}, bytes, and hashes.
    """

    def __init__(self, model: nn.Module, tokenizer, name: str, blocks: list[Block] | None = None, read: Callable | None = None,
                 folder: Path | None = None):
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.blocks, self._read, self._folder = blocks or [], read, folder
        self._ahead: ReadAhead | None = None
        self.shapes: dict[str, tuple[int, int]] = {}
        self.weight_bytes: dict[str, int] = {}
        self.nbytes = 0                                         # of all tensors
        self.experts: dict[str, list[str]] = {}                 # block -> its experts modules that were unfused
        self.warnings: dict[str, list[str]] = {}
        self._hashes: dict[str, str] = {}
        self._non_finite: dict[str, int] = {}

    @property
    def streamed(self) -> bool:
        """Whether the blocks' weights are read one block at a time."""
        return self._read is not None

    @torch.no_grad()
    def survey(self, tokens: Tensor, device: torch.device) -> None:
        """Runs the dense model on `tokens` [1, n] once, and so reads, hashes and checks all its weights before any work.

        Raises ConfigError for models that cannot be quantized block by block.
        """
        if not self.streamed:
            self.blocks = find_blocks(self.model, tokens)
            for block in self.blocks:
                self._examine(block)
        with self._loading():
            record_calls(self.model, self.blocks, tokens, device)
        parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        for name, tensor in unique_tensors(self.model).items():
            if name not in self._hashes and not tensor.is_meta:
                self._note(name, tensor, name in parameters)

    @property
    def weights_sha256(self) -> dict[str, str]:
        """{tensor: hash} of the dense model, as far as it was surveyed."""
        return dict(sorted(self._hashes.items()))

    def require_finite(self, names) -> None:
        """Raises NumericalError unless all parameters of the model are finite; names the weights of these linears first."""
        for name in (*(f"{linear}.weight" for linear in names), *self._non_finite):
            if self._non_finite.get(name):
                module, _, leaf = name.rpartition(".")
                raise NumericalError(f"{module or name}: the {leaf} holds {self._non_finite[name]} non-finite values; the source "
                                     "checkpoint is damaged or its dtype overflowed")

    def load(self, block: Block) -> dict[str, nn.Module]:
        """Reads the weights of a block, unless they are in memory -> {full name: linear}."""
        if self.streamed and any(tensor.is_meta for tensor in block.module.state_dict().values()):
            if self._ahead is not None and (found := self._ahead.take(block.name)) is not None:
                block.module.load_state_dict({name.removeprefix(block.name + "."): t for name, t in found.items()}, assign=True)
                return linears(block.module, block.name)
            fresh = self._read(block.name)
            block.module.__dict__.update({kind: fresh.__dict__[kind] for kind in ("_modules", "_parameters", "_buffers")})
            if block.name in self.experts:
                unfuse_experts(self.model, [block])
            else:
                self._examine(block)
        return linears(block.module, block.name)

    def release(self, block: Block) -> None:
        """Gives the memory of a block back, where it can be read again."""
        if self.streamed:
            block.module.to("meta")

    @contextlib.contextmanager
    def reading_ahead(self, device: torch.device) -> Iterator[None]:
        """Within it `read_ahead` has a GPU's next block read while it works; with other devices, and models in memory, nothing is."""
        self._ahead = ReadAhead(self._folder, self._hashes, device) if reads_ahead(self, device) else None
        try:
            yield
        finally:
            if self._ahead is not None:
                self._ahead.close()
            self._ahead = None

    def read_ahead(self, block: Block, working: int, device: torch.device) -> None:
        """Begins to read a block that is on meta; it goes on to `device` where it leaves `working` bytes and a tenth of all free."""
        wanted = block.module.state_dict(prefix=block.name + ".")
        lasting = {name for name, _ in block.module.named_buffers(prefix=block.name)} <= wanted.keys()
        if self._ahead is not None and lasting and self._ahead.readable(wanted):
            free = ops.free_bytes(device)
            need = working + sum(t.numel() * t.element_size() for t in wanted.values())
            self._ahead.start(block.name, wanted, free is None or need <= 0.9 * free[0])

    @contextlib.contextmanager
    def loaded(self, block: Block, device: torch.device) -> Iterator[dict[str, nn.Module]]:
        """{full name: linear} of a dense block that is on `device` meanwhile; afterwards all is as it was."""
        found, arguments = self.load(block), (block.args, block.kwargs)
        home = next(block.module.parameters()).device
        try:
            block.to(device)
            yield found
        finally:
            block.module.to(home)
            block.args, block.kwargs = arguments
            self.release(block)

    @torch.no_grad()
    def logits(self, tokens: Tensor, device: torch.device) -> Tensor:
        """[samples, n, vocabulary] of the dense model for `tokens` [samples, n], on the CPU."""
        with self.dense(device):
            return call(self.model, tokens).logits.cpu()

    @contextlib.contextmanager
    def dense(self, device: torch.device) -> Iterator[None]:
        """Within it the whole dense model can be called; its blocks run on `device`, one there at a time."""
        with self._loading():
            handles = run_on(device, self.model, self.blocks)
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def install(self, packed: dict[str, VQWeight]) -> None:
        """Puts the packed linears in place of the dense ones."""
        for name, vq in packed.items():
            linear = self.model.get_submodule(name)
            self.model.set_submodule(name, VQLinear.from_weight(vq, linear.bias, name))

    @contextlib.contextmanager
    def _loading(self):
        """For calls of the whole dense model: before a block's turn it is loaded, and the one before it released."""
        loaded: list[Block] = []

        def enter(block: Block) -> None:
            if block not in loaded:
                while loaded:
                    self.release(loaded.pop())
                self.load(block)
                loaded.append(block)

        handles = [block.module.register_forward_pre_hook(lambda module, args, block=block: enter(block))
                   for block in self.blocks if self.streamed]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            while loaded:
                self.release(loaded.pop())

    def _examine(self, block: Block) -> None:
        """Notes what a block holds when it is first seen; a dense model's experts are unfused from then on."""
        self.experts[block.name], self.warnings[block.name] = unfuse_experts(self.model, [block])
        found = linears(block.module, block.name)
        for name, linear in found.items():
            self.shapes[name] = tuple(dense_weight(linear).shape)
            self.weight_bytes[name] = linear.weight.numel() * linear.weight.element_size()
        parameters = {name for name, _ in block.module.named_parameters(block.name, remove_duplicate=False)}
        for name, tensor in block.module.state_dict(prefix=block.name + ".").items():
            self._note(name, tensor, name in parameters)

    def _note(self, name: str, tensor: Tensor, parameter: bool) -> None:
        """Hashes a tensor; counts its bytes and, of a parameter, the values that are not finite: buffers may hold masks of -inf."""
        self._hashes[name] = digest(tensor)
        self.nbytes += tensor.numel() * tensor.element_size()
        if parameter and tensor.is_floating_point():
            self._non_finite[name] = sum(int((~torch.isfinite(part)).sum()) for part in tensor.flatten().split(_CHUNK))


def open_stream(source, dtype, tokenizer, whole: bool = False) -> BlockStream:
    """Of a module, or of a folder, a hub id or a .gguf file; whole: with all blocks in memory, wherever it comes from."""
    if isinstance(source, nn.Module):
        return BlockStream(source.eval(), tokenizer, type(source).__name__)
    from . import hf, parts

    hf.read_dtype(dtype)
    folder = None if whole else parts.streamable(source)
    if folder is None or (found := parts.open_skeleton(folder, dtype)) is None:
        model, own, name = hf.open_dense(source, dtype)
        return BlockStream(model, own if tokenizer is None else tokenizer, name)
    model, list_name, members = found
    name = Path(source).resolve().name if Path(source).exists() else str(source)
    return BlockStream(model, hf.read_tokenizer(folder) if tokenizer is None else tokenizer, name,
                       [Block(f"{list_name}.{index}", module) for index, module in enumerate(members)],
                       lambda block: parts.read_block(folder, dtype, block), folder)


def reads_ahead(stream: BlockStream, device: torch.device) -> bool:
    """Whether a run on `device` reads one block ahead; a CPU has enough to do, and no second memory to put it into."""
    return stream.streamed and device.type == "cuda"


class Activations:
    """Lists for the hidden states of this rank's samples.

    They are in memory, or in files below the journal's folder where half of the memory would not hold those of all ranks.  `home` is the
    memory: that of a GPU which has the room, lest every state be copied there and back for every linear.
    """

    def __init__(self, journal: Journal | None, samples: Samples, nbytes: int, device: torch.device):
        """nbytes: of one sample's state."""
        self.journal, self.samples, self._scratches = journal, samples, 0
        self.on_disk, self.disk_bytes = (False, 0) if journal is None else states_on_disk(samples.total, nbytes)
        if self.on_disk and samples.parts > 1:
            self.disk_bytes += _COMMITTED * samples.total * nbytes      # the journal's, beside the ranks' own
        self.home = device if not self.on_disk and states_on_device(len(samples), nbytes, device) else torch.device("cpu")

    def new(self, kind: str, block: int) -> list[Tensor] | TensorList:
        """For a stream behind a block, which a commit makes part of the journal; see `whole`."""
        if self.samples.parts > 1:
            return self.scratch()
        return TensorList(self.journal.path(kind, block), len(self.samples)) if self.on_disk else []

    def whole(self, kind: str, block: int, states: list[Tensor] | TensorList) -> list[Tensor] | TensorList:
        """A new stream's states of all samples, on rank 0; the other ranks hand theirs over."""
        if self.samples.parts == 1:
            return states
        whole = TensorList(self.journal.path(kind, block), self.samples.total) if self.on_disk and not ranks.rank() else []
        for state in self.samples.collect(states):
            whole.append(state)
        return whole

    def scratch(self) -> list[Tensor] | TensorList:
        """For what nobody needs after the block."""
        self._scratches += 1
        path = self.journal.folder / f"scratch-{ranks.rank()}-{self._scratches}" if self.on_disk else None
        return TensorList(path, len(self.samples), scratch=True) if self.on_disk else []

    def at_home(self, states: list[Tensor] | TensorList) -> list[Tensor] | TensorList:
        """States in memory where they belong; what is computed from them stays there."""
        return states if self.on_disk else [state.to(self.home) for state in states]

    def stored(self, kind: str, block: int) -> list[Tensor] | TensorList:
        """This rank's samples of a stream as it was committed behind a block."""
        found, samples = TensorList.open(self.journal.path(kind, block)), self.samples
        if len(found) != samples.total:
            raise FormatError(f"{found.path}: got {len(found)} samples, need {samples.total}; start over (--fresh, resume=\"fresh\")")
        if self.on_disk and samples.parts == 1:
            return found
        own = self.scratch()
        for i in range(samples.first, samples.last):
            own.append(found[i])
        return self.at_home(own)


def states_on_disk(samples: int, nbytes: int) -> tuple[bool, int]:
    """(whether a run with a journal has its hidden states in files only, bytes of those on the disk); nbytes: of one sample's state."""
    files_only = _STREAMS * samples * nbytes > available_memory() / 2
    return files_only, samples * nbytes * (_IN_FILES if files_only else _COMMITTED)


def states_on_device(samples: int, nbytes: int, device: torch.device) -> bool:
    """Whether a run has its hidden states on a GPU: two fifths of what is free there hold them, nbytes each."""
    free = ops.free_bytes(device)
    return free is not None and 5 * _STREAMS * samples * nbytes < 2 * free[0]


def packed_weight(record: LayerRecord, read: Callable[[str], Tensor]) -> VQWeight:
    """The weight of a layer from a file's tensors."""
    return VQWeight(record.spec, {buffer: read(f"{record.name}.{buffer}") for buffer in record.spec.buffer_shapes()})
