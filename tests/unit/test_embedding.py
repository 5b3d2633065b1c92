"""Rows looked up in a packed weight are those of the dequantized one, bit for bit."""
import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import embedding

from gptvq import VQLinear
from gptvq.embedding import TiedEmbedding, VQEmbedding, put_head
from gptvq.errors import ConfigError
from gptvq.spec import FORMATS, QuantSpec
from gptvq.weight import DTYPES, VQWeight

SHAPES = [(1, 1), (16, 32), (37, 61), (50, 130)]


def packed(spec):
    """Random bytes in every buffer, but for scales that are finite."""
    generator = torch.Generator().manual_seed(1)
    buffers = {}
    for name, (shape, dtype) in spec.buffer_shapes().items():
        if dtype in ("uint8", "int8"):
            buffers[name] = torch.randint(256, shape, dtype=torch.uint8, generator=generator).view(DTYPES[dtype])
        else:
            buffers[name] = torch.rand(shape, generator=generator, dtype=torch.float32).to(DTYPES[dtype])
    return VQLinear.from_weight(VQWeight(spec, buffers), name="head")


@pytest.mark.parametrize("scale_block", [0, 32])
@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f"{f[0]}d{f[1]}")
def test_rows_of_every_format(format, scale_block):
    for (rows, cols), dtype in itertools.product(SHAPES, (torch.float32, torch.bfloat16)):
        head = packed(QuantSpec(rows, cols, *format, min(rows, 20), 64, scale_block))
        ids = torch.randint(rows, (3, 7), generator=torch.Generator().manual_seed(2))
        ids[0, 0], ids[-1, -1] = 0, rows - 1
        table = TiedEmbedding(head, dtype)
        assert torch.equal(table(ids), embedding(ids, head.dequantize(dtype))) and table(ids).dtype == dtype
        assert torch.equal(table.weight, head.dequantize(dtype)) and table(ids[:, :0]).shape == (3, 0, cols)


def test_svd_codebooks():
    head = packed(QuantSpec(40, 64, 1, 3, 16, 64, svd_rank=2))
    assert torch.equal(TiedEmbedding(head, torch.float32)(torch.arange(40)), head.dequantize())


@pytest.mark.parametrize("spec", [QuantSpec(40, 64, 1, 3, 16, 64, svd_rank=2), *(QuantSpec(40, 64, *f, 16, 64, 32) for f in FORMATS)],
                         ids=lambda spec: spec.form)
def test_the_default_dtype_changes_no_value(spec):
    head, ids = packed(spec), torch.arange(40)
    want = head.dequantize(), head(torch.eye(64)), TiedEmbedding(head, torch.float32)(ids)
    try:
        torch.set_default_dtype(torch.bfloat16)
        again = packed(spec)
        found = again.dequantize(), again(torch.eye(64, dtype=torch.float32)), TiedEmbedding(again, torch.float32)(ids)
        for one, other in zip(found, want):
            assert torch.equal(one, other)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind", [TiedEmbedding, lambda head, dtype: VQEmbedding.of(head.packed, dtype, name="table")])
def test_ids_are_those_of_an_embedding(kind):
    head = packed(QuantSpec(40, 64, 2, 4, 16, 64))
    table, dense = kind(head, torch.float32), nn.Embedding.from_pretrained(head.dequantize())
    assert torch.equal(table(torch.tensor([39, 0], dtype=torch.int32)), dense(torch.tensor([39, 0])))
    assert table(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, 64)
    for ids in ([-1], [40], [3, -100], [[3], [100]]):
        for each in (table, dense):
            with pytest.raises(IndexError, match="index out of range in self"):
                each(torch.tensor(ids))
    for dtype in (torch.float32, torch.bool, torch.int16, torch.uint8):
        for each in (table, dense):
            with pytest.raises(RuntimeError):
                each(torch.ones(2, dtype=dtype))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = packed(QuantSpec(40, 64, 2, 4, 16, 64))
        self.table = TiedEmbedding(self.head, torch.float32)


def test_it_goes_where_its_head_goes():
    pair = Pair()
    assert {name.partition(".")[0] for name in pair.state_dict()} == {"head"}
    twin = copy.deepcopy(pair).to(torch.float16)
    assert twin.table.head is twin.head and twin.head is not pair.head
    assert twin.table(torch.tensor([3])).dtype == torch.float16 and twin.head.idx.dtype == torch.uint8
    assert "tied to head" in repr(twin.table) and twin.table.weight.dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_as_gemma_does(dtype):
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    model = nn.Module()
    model.config = SimpleNamespace(get_text_config=lambda: model.config)
    model.head, model.table = nn.Linear(64, 40), Gemma3TextScaledWordEmbedding(40, 64, None, embed_scale=64 ** 0.5 + 0.1).to(dtype)
    scaled, head = model.table, packed(QuantSpec(40, 64, 2, 4, 16, 64))
    scaled.weight.data = head.dequantize(dtype)
    put_head(model, "head", head, "table")
    assert torch.equal(model.table(torch.arange(40)), scaled(torch.arange(40))) and not model.config.tie_word_embeddings


@pytest.mark.parametrize("format", [(2, 4), (2, 3), (1, 4)])
def test_it_compiles_as_one_graph(format):
    table = TiedEmbedding(packed(QuantSpec(40, 64, *format, 16, 64, 32)), torch.bfloat16)
    torch._dynamo.reset()
    ids = torch.tensor([[3, 39, 0]])
    assert torch.equal(torch.compile(table, fullgraph=True, backend="eager")(ids), table(ids))


@pytest.mark.gpu
@pytest.mark.parametrize("format", [(2, 4), (2, 3), (1, 4)])
def test_on_a_gpu_and_in_its_graphs(format):
    pair = Pair()
    pair.head = packed(QuantSpec(40, 64, *format, 16, 64, 32))
    pair.table = TiedEmbedding(pair.head, torch.float16)
    want = pair.table(torch.tensor([3, 39]))
    pair.cuda()
    ids = torch.tensor([0, 0], device="cuda")
    pair.table(ids)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows = pair.table(ids)
    ids.copy_(torch.tensor([3, 39]))
    graph.replay()
    assert torch.equal(rows.cpu(), want)


def test_only_what_fits_is_replaced():
    model = nn.Module()
    model.head, model.table = nn.Linear(64, 40), nn.Embedding(41, 64)
    with pytest.raises(ConfigError, match="table: got Embedding, need an nn.Embedding of 40 x 64 to tie to head"):
        put_head(model, "head", packed(QuantSpec(40, 64, 2, 4, 16, 64)), "table")
