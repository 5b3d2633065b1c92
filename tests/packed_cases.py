"""Random packed weights of every format and shape, for the tests of the operators."""
import itertools

import numpy as np
import torch
from hypothesis import strategies as st

from gptvq.spec import FORMATS, QuantSpec
from gptvq.weight import VQWeight

# rows, cols, group_rows, group_cols, scale_block: aligned; ragged everywhere; groups cut tiles and blocks; one group; tiny
SHAPES = [
    (32, 64, 16, 32, 0), (32, 128, 16, 64, 64), (37, 101, 5, 20, 0), (37, 101, 7, 48, 16), (17, 35, 3, 12, 0),
    (50, 33, 100, 400, 32), (16, 63, 16, 64, 64), (1, 1, 1, 4, 0), (3, 2, 1, 4, 16), (70, 130, 64, 128, 32),
]
SPECS = [QuantSpec(rows, cols, dim, bits, group_rows, group_cols, scale)
         for (dim, bits), (rows, cols, group_rows, group_cols, scale) in itertools.product(FORMATS, SHAPES)]


def spec_id(spec):
    return f"{spec.dim}d{spec.index_bits}b-{spec.rows}x{spec.cols}-g{spec.group_rows}x{spec.group_cols}-s{spec.scale_block}"


def random_codes(spec, seed=0):
    return torch.randint(0, 1 << spec.code_bits, (spec.rows, spec.vectors), dtype=getattr(torch, spec.code_dtype),
                         generator=torch.Generator().manual_seed(seed))


def random_tables(spec, seed=0):
    """(cb, gs, sc, scale table); the padding of sc holds random codes too, which nobody may look at."""
    g = torch.Generator().manual_seed(seed + 1)
    cb = torch.randint(spec.least_entry, 128, (spec.row_groups, spec.strips, spec.dim, spec.codewords), dtype=torch.int8, generator=g)
    gs = (torch.randn(spec.row_groups, spec.strips, generator=g) * 0.01).bfloat16()
    if not spec.scale_block:
        return cb, gs, None, None
    sc = torch.randint(0, 256, (spec.tiles, -(-spec.scale_blocks // 2), 16), dtype=torch.uint8, generator=g)
    return cb, gs, sc, torch.exp2(torch.randn(spec.scale_blocks, 16, generator=g))


def random_weight(spec, seed=0):
    """A VQWeight, with a product form of the codebooks where the spec asks for one."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << spec.code_bits, (spec.rows, spec.vectors), generator=g, dtype=getattr(torch, spec.code_dtype))
    tables = {}
    for name, (shape, dtype) in spec.buffer_shapes().items():
        if name in ("cb", "cb_u"):
            tables[name] = torch.randint(spec.least_entry, 128, shape, generator=g, dtype=torch.int8)
        elif name == "cb_v":
            tables[name] = torch.randn(shape, generator=g).half()
    scales = ()
    if spec.scale_block:
        scales = (torch.randint(0, 16, (spec.rows, spec.scale_blocks), generator=g, dtype=torch.uint8),
                  torch.rand(spec.scale_blocks, 2, generator=g).half() * 0.2)
    gs = torch.rand(spec.row_groups, spec.strips, generator=g) / 100 + 1e-3
    return VQWeight.from_parts(spec, codes, tables, gs, *scales)


def dequantized(spec, codes, cb, gs, sc=None, table=None):
    """f32 [rows, cols] from the definition in VQWeight's docstring: one weight at a time, codes taken as they are."""
    out = np.zeros((spec.rows, spec.cols), np.float32)
    codes, cb, gs = codes.numpy(), cb.numpy(), gs.float().numpy()
    for i in range(spec.rows):
        for j in range(spec.cols):
            group = i // spec.group_rows, j // spec.group_cols
            code = int(codes[i, j // spec.dim])
            value = np.float32(cb[group][j % spec.dim, code % spec.codewords]) * gs[group]
            value = -value if spec.signs and code >> 8 + j % spec.dim & 1 else value
            if sc is not None:
                block = j // spec.scale_block
                pair = int(sc[i // 16, block // 2, i % 16])
                value = value * np.float32(table[block, pair // 16 if block % 2 else pair % 16])
            out[i, j] = value
    return torch.from_numpy(out)


@st.composite
def specs(draw):
    """Any legal spec up to 70 x 140."""
    dim, bits = draw(st.sampled_from(sorted(FORMATS)))
    rows, cols = draw(st.integers(1, 70)), draw(st.integers(1, 140))
    scale = draw(st.sampled_from([0, 16, 32, 64]))
    step = max(4, scale)
    return QuantSpec(rows, cols, dim, bits, draw(st.integers(1, 80)), step * draw(st.integers(1, 160 // step)), scale)


def compiled_noting(model):
    """(`model` compiled without a graph break, the list that its graphs go into)."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    return torch.compile(model, fullgraph=True, backend=backend), graphs
