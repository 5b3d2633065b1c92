"""VQLinear: nn.Linear over a packed weight."""
from __future__ import annotations

import weakref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from . import ops
from .errors import ConfigError
from .spec import QuantSpec
from .unpacked import Unpacked
from .weight import DTYPES, VQWeight, bad_values, check_buffers, check_values, decode_tables


_FEW = 8                            # tokens up to which a call's own cost counts
_PATIENCE = 8                       # calls in which others may join a layer on a CPU, until it goes alone
_leader: tuple = (None, None)       # weak references to the last layer that ran on an input first, and to that input


class VQLinear(nn.Module):
    """x [.., in_features] -> [.., out_features] in x's dtype (fp32, fp16 or bf16), by kernels that read the packed weight.

    `activations`: how x enters the kernels; "a16" (the default; error of 1e-4 of the output and mostly less), "a8" (faster on a
    CPU, about 1e-2, what 4-bit integer formats do) or "fp32" (exact, slow).  Many tokens at once (but for "a16" where AMX is the
    faster way), devices without kernels and anything that needs gradients go through F.linear with the dequantized weight, and
    so follow autocast; backward unpacks the weight again, so that none is kept for it.

    The buffers are the packed ones of `spec.buffer_shapes()`.  Their dtypes are part of the format: `.to()` and
    `.half()` move them and convert the bias only.  Gradients reach x and the bias, never the weight.  Buffers and bias may be
    replaced or changed in place, but for ways that PyTorch does not count (`.data`, inference tensors); compiled graphs take
    block scales and SVD factors as they were when the layer was last made, moved, loaded or called without torch.compile.
    """

    activations = "a16"
    # What is called on one input, like q, k and v, is computed in one go when the first of them is called; see _with_followers.
    _followers: tuple[VQLinear, ...] = ()
    _ready: tuple | None = None
    _tables: tuple | None = None        # (tables for decoding, what they were made from), one tuple for the sake of other threads
    _kernel: tuple | None = None        # (kernel, what it was made from)
    _call = None                        # the short way on a CPU: that kernel's, which looks at all that `forward` does but followers
    _lonely = 0                         # calls that no other layer followed

    def __init__(self, spec: QuantSpec, bias: bool = False, device=None, dtype: torch.dtype | None = None, name: str = ""):
        super().__init__()
        self.spec, self.name = spec, name
        self.in_features, self.out_features = spec.cols, spec.rows
        for buffer, (shape, kind) in spec.buffer_shapes().items():
            self.register_buffer(buffer, torch.zeros(shape, dtype=DTYPES[kind], device=device))
        self.register_parameter("bias", nn.Parameter(torch.zeros(spec.rows, device=device, dtype=dtype)) if bias else None)

    @classmethod
    def from_weight(cls, vq: VQWeight, bias: Tensor | None = None, name: str = "") -> VQLinear:
        """Takes over the buffers of `vq` and a copy of `bias` [rows]."""
        if bias is not None and tuple(bias.shape) != (vq.spec.rows,):
            raise ConfigError(f"{name or 'VQLinear'}: got a bias {tuple(bias.shape)}, need ({vq.spec.rows},)")
        self = cls(vq.spec, device="meta", name=name)
        for buffer, tensor in vq.buffers.items():
            setattr(self, buffer, tensor)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        self.make_tables()
        return self

    @property
    def packed(self) -> VQWeight:
        """The weight, sharing this module's buffers."""
        return VQWeight(self.spec, {buffer: getattr(self, buffer) for buffer in self.spec.buffer_shapes()})

    @property
    def weight(self) -> Tensor:
        """A dequantized copy, float32, for code that reads a linear's weight; writing into it changes nothing."""
        return self.dequantize()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[out_features, in_features] in `dtype`."""
        return ops.dequantize(*self._decode_tables(), self.spec, dtype)

    def forward(self, x: Tensor) -> Tensor:
        # Written for few look-ups: at one token a small layer's kernel takes as long as ten lines of Python.
        if not is_dynamo_compiling() and self._call is not None and self._ready is None:
            y = self._call(x, self.activations, self._buffers, self._parameters)
            if y is not None:
                return y
        if x.dtype not in ops.FLOATS or not x.ndim or x.shape[-1] != self.in_features:
            ops.check_input(x, self.in_features, self.name or "VQLinear")
        bias, buffers = self._own_bias(), self._buffers
        if torch.compiler.is_compiling() or ops.watched(x):
            return self._by_operators(x, bias)
        if x.device != buffers["idx"].device or torch.is_grad_enabled() and (x.requires_grad or bias is not None and bias.requires_grad):
            return Unpacked.apply(x, bias, self.spec, *self._decode_tables())
        kernel, ready = self._prepared(buffers, bias), self._ready
        if ready is not None:
            self.__dict__["_ready"] = None              # nn.Module's own way to set an attribute takes a microsecond
            if ready[0] is x and ready[1] == x._version and ready[2] is kernel and ready[3] == self.activations and (
                    ready[5] is None or ready[5] == kernel.turn()):
                return ready[4]
        if self.activations not in ops.ACTIVATIONS:
            ops.check_activations(self.activations)
        if getattr(kernel, "joins", False) and x.numel() <= _FEW * self.in_features:
            if not x.is_inference():
                return self._with_followers(kernel, x)
            if not self._followers:
                self._go_alone(kernel, _PATIENCE)
        return kernel(x, self.activations)

    def _by_operators(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """For what records or transforms operators."""
        if torch.compiler.is_compiling() or not ops.transformed():
            gradients = not is_dynamo_compiling() or torch.is_grad_enabled()    # torch.func may want some where x.requires_grad is False
            return ops.linear(x, *self._decode_tables(), bias, self.spec, self.activations, gradients)
        weight = ops.dequantize_operator(*self._decode_tables(), self.spec, x.dtype)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))

    def _with_followers(self, kernel, x: Tensor) -> Tensor:
        """y of a few tokens.  Learns which layers are called next on the very same tensor, and computes theirs along with it.

        Only of layers whose kernels `join`: for others that costs more than it saves.  A follower takes its result only for that
        tensor, unchanged since (inference tensors do not count changes and so are left out; nor does memory that is shared with NumPy),
        if it is itself unchanged, and on a GPU where the same stream runs or is captured; one that leaves a result lying, or that was
        moved, is followed no more.
        """
        global _leader
        leader, of = _leader
        if of is not None and of() is x and (first := leader()) is not None and first is not self:
            if self._learnable(first):
                first._followers += (self,)
        else:
            _leader = weakref.ref(self), weakref.ref(x)
        activations, followers = self.activations, self._followers
        if not followers:
            self._go_alone(kernel, 1)
            return kernel(x, activations)
        here = type(kernel) if kernel.turn is None else None        # a kernel of that type is on the CPU: devices compare slowly
        for follower in followers:
            if follower._ready is not None or follower.activations != activations or (
                    follower._kernel is None or type(follower._kernel[0]) is not here) and follower._buffers["idx"].device != x.device:
                followers = self._followers = tuple(f for f in followers if f._ready is None and f.activations == activations
                                                    and f._buffers["idx"].device == x.device)
                break
        if not followers:
            return kernel(x, activations)
        others = [f._kernel[0] if f._kernel else f._prepared(f._buffers, f._own_bias()) for f in followers]
        mine, *theirs = kernel.together(others, x, activations)
        version, turn = x._version, kernel.turn and kernel.turn()
        for follower, other, y in zip(followers, others, theirs):
            follower.__dict__["_ready"] = x, version, other, activations, y, turn
        return mine

    def _go_alone(self, kernel, calls: int) -> None:
        """After _PATIENCE calls that nobody followed, a layer on a CPU takes the short way, and joins no others."""
        if kernel.turn is None and self._lonely < _PATIENCE:
            self.__dict__["_lonely"] = self._lonely + calls
            made = self._kernel
            if self._lonely >= _PATIENCE and made is not None and made[0] is kernel:
                self._call = _short_way(made)

    def _learnable(self, leader: VQLinear) -> bool:
        return self not in leader._followers and len(leader._followers) < 8 and self.in_features == leader.in_features

    def _own_bias(self) -> Tensor | None:
        """`self.bias` without nn.Module.__getattr__, which is slow; in replicas of nn.DataParallel it is a plain attribute."""
        parameters = self._parameters
        return parameters["bias"] if "bias" in parameters else self.bias

    def _prepared(self, buffers: dict[str, Tensor], bias: Tensor | None):
        made = self._kernel
        if made and made[1] == [*map(id, buffers.values())] and made[4] is bias and (bias is None or made[5] == bias.data_ptr()):
            for tensor, count in made[2]:
                if tensor._version != count:
                    break
            else:
                return made[0]
        # The state first: what another thread changes meanwhile then counts as a change.
        state = *_state(buffers, bias), bias, 0 if bias is None else bias.data_ptr()
        kernel = ops.prepare_linear(*self._decode_tables(), bias, self.spec)
        self._kernel = made = kernel, *state
        self._call, self._lonely = None if getattr(kernel, "joins", True) else _short_way(made), 0
        return kernel

    def to_dense(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """nn.Linear with the dequantized weight, for inputs of `dtype`; its forward is this one without the error of `activations`."""
        dense = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        dense.weight = nn.Parameter(self.dequantize(dtype), requires_grad=False)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().to(dtype, copy=True), requires_grad=self.bias.requires_grad)
        return dense

    def check(self, where: str = "") -> None:
        """Raises FormatError unless the buffers are what the spec asks for and decode to finite weights."""
        buffers = {buffer: getattr(self, buffer) for buffer in self.spec.buffer_shapes()}
        check_buffers(self.spec, buffers, where or self.name)
        if not self.gs.is_meta:
            check_values(self.spec, buffers, where or self.name)

    def extra_repr(self) -> str:
        s = self.spec
        scales = f", scale_block={s.scale_block}" if s.scale_block else ""
        svd = f", svd_rank={s.svd_rank}" if s.svd_rank else ""
        return (f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {s.form} "
                f"in groups of {s.group_rows}x{s.group_cols}{scales}{svd}, {s.bits_per_value:.3f} bits per value")

    def make_tables(self) -> None:
        """What decoding takes besides the buffers, made now: a compiled graph would make it on each call, and wait for the CPU."""
        if not self._buffers["idx"].is_meta:
            self._decode_tables()

    def _decode_tables(self) -> tuple:
        # Expanded codebooks and scale tables cost more than a small GEMV: kept until the buffers change.
        made, buffers, compiling = self._tables, self._buffers, torch.compiler.is_compiling()
        if made is not None and made[0][0] is buffers["idx"] and (compiling or made[1] == [*map(id, buffers.values())]
                                                                  and all(t._version == count for t, count in made[2])):
            return made[0]
        if compiling or ops.watched(buffers["idx"]):            # a new attribute would compile the graph anew
            return decode_tables(self.spec, buffers)
        with torch.inference_mode(False):                       # tables that backward may keep, whoever calls first
            for buffer in self.spec.buffer_shapes():            # kernels read the buffers themselves, and so see later changes
                buffers[buffer] = buffers[buffer].contiguous()
            state = _state(buffers)
            tables = decode_tables(self.spec, buffers)
        self._tables = tables, *state
        return tables

    def __setattr__(self, name: str, value) -> None:
        super().__setattr__(name, value)
        if name == "bias" or name in self.__dict__.get("_buffers", ()):
            self._forget()

    def _forget(self) -> None:
        self._tables = self._kernel = self._call = self._ready = None

    def _replicate_for_data_parallel(self) -> VQLinear:
        replica = super()._replicate_for_data_parallel()
        replica._followers, replica._ready, replica._call = (), None, None       # those of this module, on its device
        return replica

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_tables": None, "_kernel": None, "_call": None, "_followers": (), "_ready": None}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.make_tables()

    def _apply(self, fn, recurse=True):
        before = {buffer: self._buffers[buffer] for buffer in self.spec.buffer_shapes()}
        super()._apply(fn, recurse)
        for buffer, tensor in before.items():
            if self._buffers[buffer].dtype != tensor.dtype:     # fn was a cast: redo the move alone
                self._buffers[buffer] = tensor.to(self._buffers[buffer].device)
        self._forget()
        self._followers = ()
        self.make_tables()
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        for buffer, (_, kind) in self.spec.buffer_shapes().items():
            got = state_dict.get(prefix + buffer)
            if got is not None and got.dtype != DTYPES[kind]:   # copy_ would convert it silently
                error_msgs.append(f"{prefix}{buffer}: got {got.dtype}, need {DTYPES[kind]}")
            elif got is not None and not got.is_meta and (wrong := bad_values(self.spec, buffer, got)):
                error_msgs.append(f"{prefix}{buffer}: {wrong}")
            else:
                continue
            state_dict = {**state_dict, prefix + buffer: getattr(self, buffer)}     # what is refused changes nothing
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        self._forget()
        self.make_tables()


def set_activations(model: nn.Module, activations: str) -> None:
    """Sets how inputs enter the kernels of all packed layers of `model`; see VQLinear."""
    ops.check_activations(activations)
    for module in model.modules():
        if isinstance(module, VQLinear):
            module.activations = activations


def _state(buffers: dict[str, Tensor], bias: Tensor | None = None) -> tuple:
    """(ids of the buffers, what of them and the bias is copied or decoded and how often it was changed in place, the buffers by name).

    Inference tensors do not count changes.  The buffers are held so that no other can get the id of one.
    """
    buffers = dict(buffers)
    copied = (*(buffers[name] for name in ("gs", "sz", "cb_u", "cb_v") if name in buffers), bias)
    return [*map(id, buffers.values())], tuple((t, t._version) for t in copied if t is not None and not t.is_inference()), buffers


def _short_way(made: tuple):
    """See PreparedLinear.caller of the kernel in `made`, VQLinear._kernel."""
    kernel, _, counted, buffers, bias, bias_data = made
    return kernel.caller(buffers, bias, bias_data, counted)
