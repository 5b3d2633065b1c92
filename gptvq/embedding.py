"""Token embeddings looked up in packed weights: their own, or those of the output head that they are tied to."""
from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from . import ops
from .backends.reference_packed import bit_map, centroid_numbers, sign_changes
from .errors import ConfigError
from .linear import VQLinear
from .spec import TILE_ROWS, QuantSpec
from .weight import VQWeight


class TiedEmbedding(nn.Module):
    """ids [..] -> [.., width], rows of the dequantized weight of `head`, whose buffers are kept and stored under its own name alone.

    The rows come in `dtype`, which `.to()` and `.half()` change as they would change an embedding's weight, times `scale`.
    """

    def __init__(self, head: VQLinear, dtype: torch.dtype, scale: float = 1.0):
        super().__init__()
        self._of = (head,)              # in a tuple: as a submodule its buffers would have a second name
        self.num_embeddings, self.embedding_dim, self.scale = head.out_features, head.in_features, scale
        self.register_buffer("_like", torch.empty(0, dtype=dtype, device=head.idx.device), persistent=False)

    @property
    def head(self) -> VQLinear:
        return self._of[0]

    @property
    def weight(self) -> Tensor:
        """A dequantized copy without the scale, for code that reads an embedding's weight; writing into it changes nothing."""
        return self.head.dequantize(self._like.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return _rows(self.head, ids, self._like.dtype, self.scale)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, tied to {self.head.name or 'a packed head'}"


class VQEmbedding(VQLinear):
    """nn.Embedding over a packed weight of its own: ids [..] -> [.., width] in `dtype`, times `scale`, as TiedEmbedding."""

    def __init__(self, spec: QuantSpec, dtype: torch.dtype, scale: float = 1.0, device=None, name: str = ""):
        super().__init__(spec, False, device, name=name)
        self.num_embeddings, self.embedding_dim, self.scale = spec.rows, spec.cols, scale
        self.register_buffer("_like", torch.empty(0, dtype=dtype, device=device), persistent=False)

    @classmethod
    def of(cls, vq: VQWeight, dtype: torch.dtype, scale: float = 1.0, name: str = "") -> VQEmbedding:
        """Takes over the buffers of `vq`."""
        self = cls(vq.spec, dtype, scale, vq.buffers["idx"].device, name)
        for buffer, tensor in vq.buffers.items():
            setattr(self, buffer, tensor)
        self.make_tables()
        return self

    @property
    def weight(self) -> Tensor:
        """A dequantized copy without the scale, for code that reads an embedding's weight; writing into it changes nothing."""
        return self.dequantize(self._like.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return _rows(self, ids, self._like.dtype, self.scale)


def _rows(layer: VQLinear, ids: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    if not (torch.compiler.is_compiling() or ops.watched(ids)):
        _check_ids(ids, layer)
    rows = lookup(layer.spec, layer._decode_tables(), ids.reshape(-1).to(layer.idx.device)).to(dtype).view(*ids.shape, layer.in_features)
    return rows if scale == 1 else rows * torch.full((), scale, dtype=dtype, device=rows.device)


def _check_ids(ids: Tensor, layer: VQLinear) -> None:
    """Refuses what nn.Embedding refuses, with its exceptions; not the range of ids on a GPU, for which the CPU would have to wait."""
    if ids.dtype not in (torch.int64, torch.int32):
        raise RuntimeError(f"{layer.name or 'embedding'}: got ids of {ids.dtype}, need torch.int64 or torch.int32")
    if ids.device.type == "cpu" and (count := ids.numel()):
        least, most = (ids.item(),) * 2 if count == 1 else ids.aminmax()       # item takes a tenth of the time
        if least < 0 or most >= layer.out_features:
            raise IndexError(f"index out of range in self: got ids from {int(least)} to {int(most)}, {layer.name or 'the embedding'} has "
                             f"{layer.out_features} rows")


def put_embedding(model: nn.Module, name: str, vq: VQWeight) -> None:
    """Puts a packed weight in the place of an embedding that is tied to nothing."""
    before = model.get_submodule(name)
    model.set_submodule(name, VQEmbedding.of(vq, before.weight.dtype, scale_of(before), name).to(before.weight.device))


def put_head(model: nn.Module, name: str, head: VQLinear, embedding: str | None) -> None:
    """Puts a packed output head into a Hugging Face model, and the embedding (its full name) that is tied to it, if any."""
    model.set_submodule(name, head)
    if embedding is None:
        return
    before = model.get_submodule(embedding)
    if not isinstance(before, nn.Embedding) or tuple(before.weight.shape) != (head.out_features, head.in_features):
        raise ConfigError(f"{embedding}: got {type(before).__name__}, need an nn.Embedding of {head.out_features} x {head.in_features} to "
                          f"tie to {name}")
    model.set_submodule(embedding, TiedEmbedding(head, before.weight.dtype, scale_of(before)))
    for settings in (model.config, model.config.get_text_config()):
        settings.tie_word_embeddings = False        # transformers would look for the weight of either
    if getattr(model, "all_tied_weights_keys", None):
        model.all_tied_weights_keys = {key: of for key, of in model.all_tied_weights_keys.items() if key != f"{name}.weight"}


def scale_of(embedding: nn.Embedding) -> float:
    """The factor that transformers' scaled embeddings multiply their rows by; 1 for any other."""
    scale = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", 1.0))
    return float(scale) if isinstance(scale, (int, float)) else 1.0


def lookup(spec: QuantSpec, tables: tuple, rows: Tensor) -> Tensor:
    """float32 [n, cols]: those `rows` (int64 [n]) of the weight whose `weight.decode_tables` are given, bit for bit as dequantized."""
    idx, cb, gs, sc, scales = tables
    tile, row = rows // TILE_ROWS, rows % TILE_ROWS
    codes = _codes(idx.view(spec.tiles, spec.blocks, -1, TILE_ROWS, 4)[tile, :, :, row].flatten(2), spec)      # [n, vectors]
    strip = torch.arange(spec.vectors, device=rows.device) * spec.dim // spec.group_cols
    group = (rows // spec.group_rows)[:, None]
    vectors = cb.transpose(2, 3)[group, strip, centroid_numbers(codes)].float() * gs.float()[group, strip][..., None]
    if spec.signs:
        vectors = vectors * sign_changes(codes, spec.dim)
    values = vectors.flatten(1)[:, : spec.cols]
    if sc is not None:
        packed = sc[tile, :, row]                                                                           # [n, pairs of blocks]
        nibbles = torch.stack([packed & 15, packed >> 4], -1).flatten(1)[:, : spec.scale_blocks].long()
        factors = scales[torch.arange(spec.scale_blocks, device=rows.device), nibbles]
        values = values * factors.repeat_interleave(spec.scale_block, 1)[:, : spec.cols]
    return values


def _codes(data: Tensor, spec: QuantSpec) -> Tensor:
    """Codes of `spec.code_dtype` [n, vectors] from the bytes of rows, u8 [n, blocks, bytes]."""
    if spec.code_bits != 8:
        byte, bit, weight = _places(spec.code_bits, spec.dim, data.device)
        data = ((data[:, :, byte] >> bit & 1) * weight).sum(-1)
    return data.flatten(1)[:, : spec.vectors].to(getattr(torch, spec.code_dtype))


@torch.compiler.assume_constant_result
def _places(code_bits: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(byte, bit, its value in the code) of each bit of each vector of a block, [vectors, code_bits]; see `bit_map`."""
    return _cached_places(code_bits, dim, device)


@functools.lru_cache(maxsize=None)          # a CUDA graph can only be captured of what copies nothing to the device
def _cached_places(code_bits: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    byte, bit = bit_map(code_bits, dim).unbind(-1)
    weight = 1 << torch.arange(code_bits, dtype=torch.uint8 if code_bits <= 8 else torch.int16)
    return byte.to(device), bit.to(device, torch.uint8), weight.to(device)
