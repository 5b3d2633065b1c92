"""The compiled module gptvq._C on CPU tensors; nothing else calls it."""
from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ACTIVATIONS
from ..errors import ConfigError
from ..spec import QuantSpec
from . import module, reference
from .prepared import Remembered

_C, _why = module.compiled()
if _C is not None:
    module.introduce_torch(_C)


def serves(device: torch.device) -> bool:
    return _C is not None and device.type == "cpu"


def why_not(device: torch.device) -> str:
    """One clause saying why this backend does not serve `device`."""
    if _C is None:
        return f"the compiled module gptvq._C {_why}"
    return f"it has no kernels for device type {device.type!r}"


def _call(function, *args):
    """Calls into C++ with tensors as (address, dtype, shape, strides in elements), where they are checked.

    `args` keeps the tensors alive during the call.  Raises ConfigError for a tensor that C++ refuses.
    """
    for arg in args:
        if isinstance(arg, Tensor) and arg.device.type != "cpu":
            raise ConfigError(f"{function.__name__}: got a tensor on {arg.device}, need all tensors on the CPU like the indices")
    try:
        return function(*((a.data_ptr(), str(a.dtype)[6:], tuple(a.shape), a.stride()) if isinstance(a, Tensor) else a for a in args))
    except ValueError as error:
        raise ConfigError(f"{function.__name__}: {error}") from None


def _spec(spec: QuantSpec) -> tuple[int, ...]:
    return spec.rows, spec.cols, spec.dim, spec.index_bits, spec.group_rows, spec.group_cols, spec.scale_block


def pack_codes(codes: Tensor, spec: QuantSpec) -> Tensor:
    idx = torch.empty(spec.tiles, spec.blocks, spec.block_bytes, dtype=torch.uint8)
    _call(_C.pack_codes, codes.contiguous(), idx, _spec(spec))
    return idx


def unpack_codes(idx: Tensor, spec: QuantSpec) -> Tensor:
    codes = torch.empty(spec.rows, spec.vectors, dtype=getattr(torch, spec.code_dtype))
    _call(_C.unpack_codes, idx.contiguous(), codes, _spec(spec))
    return codes


def dequantize(idx: Tensor, cb: Tensor, gs: Tensor, sc: Tensor | None, table: Tensor | None, spec: QuantSpec,
               dtype: torch.dtype) -> Tensor:
    out = torch.empty(spec.rows, spec.cols, dtype=dtype)
    tensors = [None if t is None else t.contiguous() for t in (idx, cb, gs, sc, table)]
    _call(_C.dequantize, *tensors, out, _spec(spec), torch.get_num_threads())
    return out


# ---- y = W x
_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_MODES = {name: code for code, name in enumerate(ACTIVATIONS)}
#: Tokens from which unpacking the weight for a dense product is the faster way, but for what `_tiles_win` says.
DENSE_FROM = 512
_DENSE_BYTES = 8 << 20          # of the rows that are unpacked at a time
#: Bytes of indices from which a layer computes those that follow it on one input along with its own output.  Measured on two cores: below,
#: keeping track of them takes longer than the starts of threads that it saves, above neither wins by more than 2 %.
JOIN_FROM = 4 << 20


def instruction_sets() -> list[str]:
    """Those of this build that the processor has, best first; GPTVQ_CPU names the one to use."""
    return _C.instruction_sets()


def quantizing_text() -> str:
    """Which instructions quantization takes here; GPTVQ_CPU lowers them, as it was when the module was loaded."""
    return f"{_C.product_instructions(False)}, products of bfloat16 inputs by {_C.product_instructions(True)}"


def cuda_info() -> dict:
    """{available, device_count, runtime, driver, why}: what CUDA offers to this build here."""
    return _C.cuda_info()


def cuda_text() -> str:
    """One clause on what CUDA offers to this build here."""
    if _C is None:
        return "gptvq._C is missing"
    info = cuda_info()
    return f"{info['device_count']} devices, runtime {info['runtime']}, driver {info['driver']}" if info["available"] else info["why"]


class PreparedLinear:
    """f(x, activations) on the CPU: keeps the packed tensors alive and the kernels' view of them."""

    turn = None                         # results are there when a call returns; see cuda_linear

    def __init__(self, idx, cb, gs, sc, table, bias, spec: QuantSpec):
        self.spec, self.rows, self.cols = spec, spec.rows, spec.cols
        self.packed = [None if t is None else t.detach().contiguous() for t in (idx, cb, gs, sc, table)]
        self.bias = None if bias is None else bias.detach().float().contiguous()
        instructions = os.environ.get("GPTVQ_CPU", "")
        self.kernel = _call(_C.Linear, *self.packed, self.bias, _spec(spec), instructions)
        self.joins = idx.numel() >= JOIN_FROM
        self.tiles = self.kernel.fast and (instructions or instruction_sets()[0]) == "amx"

    def __call__(self, x: Tensor, activations: str) -> Tensor:
        tokens = x.numel() // self.cols
        if tokens >= DENSE_FROM:
            return self._in_parts(x, tokens) if activations == "a16" and self._tiles_win(x.dtype) else self._dense(x)
        x, y = x.contiguous(), _output(x, self.rows)
        self.kernel.run(x.data_ptr(), _TYPES[x.dtype], tokens, y.data_ptr(), _MODES[activations], torch.get_num_threads())
        return y

    def caller(self, buffers: dict[str, Tensor], bias: nn.Parameter | None, bias_data: int, counted: tuple[tuple[Tensor, int], ...]):
        """f(x, activations, buffers, parameters) -> y, as a layer that holds these would compute it, in C++ from end to end.

        None where that is not to be had; and f gives None where x, the layer or PyTorch's state ask for more than this kernel: a type,
        device or size of x that it does not take as it is, gradients, something that watches operators, other buffers than these, a
        bias at another address or the `counted` ones at other counts.
        """
        return _C.caller(self.kernel, self, buffers, bias, bias_data, counted, ACTIVATIONS, DENSE_FROM - 1)

    def remember(self, idx: Tensor, views: list[Tensor | None], counts: list[int | None], spec: QuantSpec):
        """As long as the result lives, `recall` takes calls of a few tokens on tensors like `views`, so often changed; see Remembered."""
        return _C.remember(self.kernel, self, idx, spec.key, views, counts, ACTIVATIONS, DENSE_FROM - 1)

    def _tiles_win(self, dtype: torch.dtype) -> bool:
        """Measured on a Xeon with AMX: against products of PyTorch in bfloat16, which take tiles too, only in large layers whose scales
        change rarely."""
        return self.tiles and (dtype != torch.bfloat16 or
                               self.rows >= 1024 and (self.spec.scale_block or min(self.spec.group_cols, self.cols)) >= 128)

    def _in_parts(self, x: Tensor, tokens: int) -> Tensor:
        """So few tokens at a time that the memory for them, which threads keep, stays small."""
        inputs, y, parts = x.reshape(-1, self.cols).contiguous(), _output(x, self.rows), -(-tokens // DENSE_FROM)
        for part, out in zip(inputs.chunk(parts), y.view(-1, self.rows).chunk(parts)):
            self.kernel.run(part.data_ptr(), _TYPES[x.dtype], len(part), out.data_ptr(), _MODES["a16"], torch.get_num_threads())
        return y

    def _dense(self, x: Tensor) -> Tensor:
        """Some rows at a time: their weights stay in the caches, and the memory they take is asked for once."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        step = max(16, _DENSE_BYTES // (self.cols * x.element_size()) // 16 * 16)
        weight = torch.empty(min(step, self.rows), self.cols, dtype=x.dtype)
        if step >= self.rows:
            return F.linear(x, self._unpacked(0, weight), bias)
        y, x = _output(x, self.rows), x.reshape(-1, self.cols).contiguous()
        outputs = y.view(-1, self.rows)
        for row in range(0, self.rows, step):
            part = self._unpacked(row, weight[: self.rows - row])
            outputs[:, row: row + step] = F.linear(x, part, None if bias is None else bias[row: row + step])
        return y

    def _unpacked(self, row: int, out: Tensor) -> Tensor:
        """out [rows, cols] = the weights from `row` on."""
        self.kernel.unpack(row, len(out), out.data_ptr(), _TYPES[out.dtype], torch.get_num_threads())
        return out

    def together(self, others: list[PreparedLinear], x: Tensor, activations: str) -> list[Tensor]:
        """The outputs of this layer and of others with as many columns for a few tokens x, in one call that prepares x once."""
        layers = (self, *others)
        x, outputs = x.contiguous(), [_output(x, layer.rows) for layer in layers]
        _C.linear([layer.kernel for layer in layers], x.data_ptr(), _TYPES[x.dtype], x.numel() // self.cols,
                  [y.data_ptr() for y in outputs], _MODES[activations], torch.get_num_threads())
        return outputs


def _output(x: Tensor, rows: int) -> Tensor:
    """Uninitialised y [.., rows]; sizes given one by one take torch half the time that a tuple of them does."""
    if x.ndim == 3:
        samples, tokens, _ = x.shape
        return x.new_empty(samples, tokens, rows)
    if x.ndim == 2:
        return x.new_empty(x.shape[0], rows)
    return x.new_empty(*x.shape[:-1], rows)


prepare_linear = PreparedLinear
linear = Remembered(PreparedLinear)
#: (x, idx, cb, gs, sc, table, bias, the spec's key, activations) -> what `linear` gives, in C++ from end to end, or None where that is to
#: be asked: for the first time, after a change, or with GPTVQ_BACKEND set.
recall = _C.recall if _C is not None else lambda *args: None


def matvec(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = _output(x, len(weight))
    bias = None if bias is None else bias.detach().float()
    _call(_C.matvec, weight.detach().contiguous(), x.detach().reshape(-1).contiguous(), bias, y.view(-1), torch.get_num_threads())
    return y


def _all_float32(*tensors: Tensor | None) -> bool:
    return all(t is None or t.dtype == torch.float32 for t in tensors)


def fit(x: Tensor, metric: Tensor, weight: Tensor, seeds: Tensor, rounds: tuple[tuple[int, int], ...]) -> Tensor:
    if not _all_float32(x, metric, weight, seeds):
        return reference.fit(x, metric, weight, seeds, rounds)
    centroids = seeds.new_empty(seeds.shape[1:])
    tensors = [t.contiguous() for t in (x, metric, weight, seeds)]
    _call(_C.fit, *tensors, [tuple(r) for r in rounds], centroids, torch.get_num_threads())
    return centroids


def matmul(A: Tensor, B: Tensor) -> Tensor:
    if not _all_float32(A, B):
        return reference.matmul(A, B)
    C = A.new_empty(A.shape[0], B.shape[1])
    _call(_C.matmul, A, B, C, 1.0, False, False, torch.get_num_threads())
    return C


def submatmul(C: Tensor, A: Tensor, B: Tensor) -> None:
    if not _all_float32(A, B, C):
        return reference.submatmul(C, A, B)
    _call(_C.matmul, A, B, C, -1.0, True, False, torch.get_num_threads())


def gram(total: Tensor, x: Tensor) -> None:
    x = x if x.dtype == torch.bfloat16 else x.float()
    _call(_C.matmul, x.T, x, total, 1.0, True, True, torch.get_num_threads())


def cross(total: Tensor, a: Tensor, b: Tensor) -> None:
    both = torch.bfloat16 if a.dtype == b.dtype == torch.bfloat16 else torch.float32
    _call(_C.matmul, a.to(both).T, b.to(both), total, 1.0, True, False, torch.get_num_threads())


def column_block(W: Tensor, U: Tensor, roots: Tensor, centroids: Tensor, strip: Tensor, scale: Tensor | None,
                 group_rows: int, stale: bool = False, signed: bool = False) -> tuple[Tensor, Tensor]:
    if not _all_float32(W, U, roots, centroids, scale):
        return reference.column_block(W, U, roots, centroids, strip, scale, group_rows, stale, signed)
    index, E = torch.empty(len(W), len(roots), dtype=torch.int16 if signed else torch.uint8), W.new_empty(W.shape)
    tensors = [None if t is None else t.contiguous() for t in (W, U, roots, centroids, strip, scale)]
    _call(_C.column_block, *tensors, group_rows, stale, index, E, torch.get_num_threads())
    return index, E


def descent_block(R: Tensor, H: Tensor, index: Tensor, centroids: Tensor, strip: Tensor, scale: Tensor | None,
                  group_rows: int) -> tuple[Tensor, Tensor]:
    if not _all_float32(R, H, centroids, scale):
        return reference.descent_block(R, H, index, centroids, strip, scale, group_rows)
    index, change = index.clone(memory_format=torch.contiguous_format), R.new_empty(R.shape)
    tensors = [None if t is None else t.contiguous() for t in (R, H, centroids, strip, scale)]
    _call(_C.descent_block, *tensors, group_rows, index, change, torch.get_num_threads())
    return index, change


def decode(index: Tensor, centroids: Tensor, strip: Tensor, scale: Tensor | None, group_rows: int) -> Tensor:
    if not _all_float32(centroids, scale):
        return reference.decode(index, centroids, strip, scale, group_rows)
    Q = centroids.new_empty(len(index), index.shape[1] * centroids.shape[3])
    tensors = [None if t is None else t.contiguous() for t in (index, centroids, strip, scale)]
    _call(_C.decode, *tensors, group_rows, Q, torch.get_num_threads())
    return Q


def collect(index: Tensor, values: Tensor, strip: Tensor, group_rows: int, shape: tuple[int, int, int]) -> Tensor:
    if not _all_float32(values):
        return reference.collect(index, values, strip, group_rows, shape)
    sums = torch.empty(*shape, values.shape[2], dtype=torch.float64)
    _call(_C.collect, index.contiguous(), values.contiguous(), strip, group_rows, sums, torch.get_num_threads())
    return sums
