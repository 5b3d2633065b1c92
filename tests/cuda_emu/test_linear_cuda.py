"""y = W x by the CUDA kernels, against float64 on the integers that activations become, and against float64 as such."""
import gc
import weakref

import pytest
import torch
from emulated_cuda import Machine
from linear_cases import as_integers, relative
from packed_cases import random_codes, random_tables, random_weight, spec_id

from gptvq import ops
from gptvq.backends import reference
from gptvq.errors import BackendUnavailable, ConfigError
from gptvq.linear import VQLinear
from gptvq.spec import FORMATS, QuantSpec

# rows, cols, group_rows, group_cols, scale_block: whole strips of 256; several chunks in a strip, ragged rows; narrow strips and a
# narrower last one; one group; a group of several tiles
SHAPES = [(48, 512, 16, 256, 0), (37, 1100, 48, 544, 0), (64, 512, 32, 256, 64), (33, 448, 16, 192, 64), (20, 300, 64, 512, 64),
          (40, 352, 32, 160, 32), (24, 272, 16, 96, 0), (35, 560, 48, 128, 16), (32, 200, 32, 32, 0)]
# groups of less than a tile, where tables lie in registers
SMALL = [(40, 512, 4, 256, 0), (36, 300, 8, 64, 64), (22, 320, 2, 160, 16), (50, 288, 6, 288, 64)]
SPECS = [QuantSpec(r, c, *form, *rest) for form in sorted(FORMATS) for r, c, *rest in SHAPES]
SPECS += [QuantSpec(r, c, *form, *rest) for form in ((1, 2), (1, 3), (1, 4), (2, 2)) for r, c, *rest in SMALL]
SPECS += [QuantSpec(r, c, 1, bits, *rest) for bits in (2, 3, 4) for r, c, *rest in [(18, 512, 1, 256, 0), (21, 300, 3, 32, 32)]]
# groups that cut blocks of columns, or rows that need to share a codebook: computed in float32
EXACT = [QuantSpec(30, 200, *form, 5, 24) for form in sorted(FORMATS)]
EXACT += [QuantSpec(30, 130, 2, 3, 4, 64, 32), QuantSpec(30, 130, 4, 2, 8, 64, 16), QuantSpec(30, 130, 4, 3, 8, 64, 64)]
ORDERS = ("forward", "reverse", "round robin", "random")
OUTPUT = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}     # rounding of y, relative


class Layer:
    def __init__(self, spec, machine, seed=0, bias=True):
        self.spec = spec
        tensors = reference.pack_codes(random_codes(spec, seed), spec), *random_tables(spec, seed)
        self.weight = reference.dequantize(*tensors, spec, torch.float32).double()
        self.bias = torch.randn(spec.rows, generator=torch.Generator().manual_seed(seed)) if bias else None
        self.tensors = [None if t is None else t.to(machine.device) for t in (*tensors, self.bias)]
        self.prepared = ops.prepare_linear(*self.tensors, spec)

    def want(self, x, activations):
        """(y, size of its terms) float64 [tokens, rows] for the activations that the kernels use in place of x."""
        x = x.cpu()
        if activations != "fp32" and self.prepared.kernel.fast:
            x = torch.stack([torch.from_numpy(as_integers(row, self.spec, activations)) for row in x.float().numpy()])
        bias = torch.zeros(self.spec.rows) if self.bias is None else self.bias
        return x.double() @ self.weight.T + bias, x.double().abs() @ self.weight.T.abs() + bias.abs()

    def check(self, x, activations):
        y, (want, size) = self.prepared(x, activations), self.want(x, activations)
        assert y.dtype == x.dtype and y.shape == want.shape
        error = (y.cpu().double() - want).abs()
        assert bool((error <= size * 1e-6 + want.abs() * OUTPUT[x.dtype] + 1e-7).all()), float((error / (size + 1e-7)).max())


def inputs(machine, tokens, cols, dtype=torch.float32, seed=0):
    x = torch.randn(tokens, cols, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype).to(machine.device)


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_every_format_and_shape(machine, spec):
    layer = Layer(spec, machine, bias=spec.rows % 2 == 0)
    assert layer.prepared.kernel.fast
    at = SPECS.index(spec)
    for _ in machine.orders((ORDERS[at % 4],)):
        layer.check(inputs(machine, 1, spec.cols, list(OUTPUT)[at % 3]), "a16")
    for _ in machine.orders((ORDERS[(at + 1) % 4],)):
        layer.check(inputs(machine, (2, 3, 5, 8, 9)[at % 5], spec.cols, list(OUTPUT)[(at + 1) % 3]), ("a16", "a8")[at % 2])


@pytest.mark.parametrize("form", sorted(FORMATS), ids=lambda f: f"{f[0]}d{f[1]}b")
@pytest.mark.parametrize("scale", [0, 64, 16])
def test_every_order_of_threads_gives_the_same_bits(machine, form, scale):
    layer = Layer(QuantSpec(36, 600, *form, 16, 320, scale), machine)
    for tokens in (1, 10):
        x, first = inputs(machine, tokens, 600), None
        for _ in machine.orders():
            y = layer.prepared(x, "a16").clone()
            first = y if first is None else first
            assert torch.equal(y, first)
        layer.check(x, "a16")


@pytest.mark.parametrize("spec", EXACT + [s for s in SPECS if (s.rows, s.cols) in ((33, 448), (22, 320))], ids=spec_id)
def test_float32(machine, spec):
    layer = Layer(spec, machine)
    assert layer.prepared.kernel.fast == (spec not in EXACT)
    for dtype in OUTPUT:
        for _ in machine.orders(("reverse",)):
            layer.check(inputs(machine, 6, spec.cols, dtype), "fp32")
    layer.check(inputs(machine, 1, spec.cols), "a8" if spec in EXACT else "fp32")


@pytest.mark.parametrize("form", sorted(FORMATS), ids=lambda f: f"{f[0]}d{f[1]}b")
def test_error_of_the_whole(machine, form):
    """Against the dequantized weight and x as it is, one token and several."""
    layer = Layer(QuantSpec(64, 1536, *form, 32, 256, 64), machine, bias=False)
    x = inputs(machine, 3, 1536)
    want = x.cpu().double() @ layer.weight.T
    for activations, most in (("a16", 1e-4), ("a8", 1.5e-2), ("fp32", 1e-6)):
        assert relative(layer.prepared(x, activations).cpu(), want) < most
        assert relative(layer.prepared(x[:1], activations).cpu(), want[:1]) < most


@pytest.mark.parametrize("spec", [s for s in SPECS if (s.rows, s.cols) in ((37, 1100), (33, 448), (35, 560), (21, 300))], ids=spec_id)
def test_float16(machine, spec, monkeypatch):
    """What the integers are compared with: weights, scales and inputs rounded to float16."""
    monkeypatch.setenv("GPTVQ_CUDA_LINEAR", "fp16")
    layer = Layer(spec, machine)
    for tokens in (1, 9):
        for _ in machine.orders(("random",)):
            x = inputs(machine, tokens, spec.cols)
            want, _ = layer.want(x, "fp32")
            assert 1e-5 < relative(layer.prepared(x, "a16").cpu(), want) < 1e-3
            layer.check(x, "fp32")


def test_unknown_arithmetic(machine, monkeypatch):
    monkeypatch.setenv("GPTVQ_CUDA_LINEAR", "fp8")
    with pytest.raises(BackendUnavailable, match="GPTVQ_CUDA_LINEAR='fp8' is unknown"):
        Layer(SPECS[0], machine)


@pytest.mark.parametrize("form", [(2, 2), (2, 3), (4, 2)], ids=str)
def test_outliers_stay_within_their_span(machine, form):
    """One input a thousand times the others costs precision in its own span of columns only."""
    layer = Layer(QuantSpec(32, 768, *form, 16, 256, 0), machine, bias=False)
    x = inputs(machine, 1, 768)
    x[0, 300] = 1000.0
    layer.check(x, "a16")


def test_not_finite_and_nothing(machine):
    layer = Layer(QuantSpec(32, 512, 2, 2, 16, 256, 0), machine)
    x = inputs(machine, 3, 512)
    x[0, 5], x[1, 400], x[2] = torch.nan, torch.inf, 0
    for some in (x, x[:1], x[2:]):
        y = layer.prepared(some, "a16").cpu()
        finite = torch.isfinite(some.cpu()).all(1)
        assert torch.isnan(y[~finite]).all() and torch.equal(y[finite], layer.bias.expand(int(finite.sum()), -1))
    assert layer.prepared(x[:0], "a16").shape == (0, 32)
    assert layer.prepared(x.view(3, 1, 512), "a16").shape == (3, 1, 32)


def test_layers_on_one_input_together(machine):
    """Equal and different formats, one of them on the exact path: the same bits as each by itself."""
    shapes = [(48, 16), (20, 16), (33, 48)]
    specs = [QuantSpec(rows, 512, 2, 2, height, 256, 64) for rows, height in shapes]
    specs += [QuantSpec(40, 512, 2, 2, 5, 256), QuantSpec(70, 512, 4, 2, 32, 256, 64), QuantSpec(24, 512, 4, 2, 24, 256, 64)]
    layers = [Layer(s, machine, seed) for seed, s in enumerate(specs)]
    for tokens in (1, 4):
        x = inputs(machine, tokens, 512)
        for _ in machine.orders(("random",)):
            found = layers[0].prepared.together([layer.prepared for layer in layers[1:]], x, "a16")
            assert all(torch.equal(y, layer.prepared(x, "a16")) for y, layer in zip(found, layers))
    wide = [Layer(QuantSpec(rows, 2048, 4, 2, 32, 256), machine, rows) for rows in (70, 24, 100)]       # chunks of a row on several CTAs
    x_wide = inputs(machine, 1, 2048)
    found = wide[0].prepared.together([layer.prepared for layer in wide[1:]], x_wide, "a16")
    assert all(torch.equal(y, layer.prepared(x_wide, "a16")) for y, layer in zip(found, wide))
    wide[2].check(x_wide, "a16")
    many = [Layer(QuantSpec(16, 512, 2, 2, 16, 256, 64), machine, seed) for seed in range(11)]       # more than a launch takes
    found = many[0].prepared.together([layer.prepared for layer in many[1:]], x, "a8")
    assert all(torch.equal(y, layer.prepared(x, "a8")) for y, layer in zip(found, many))


@pytest.mark.parametrize("dtype", OUTPUT)
def test_many_tokens(machine, dtype):
    """Up to 64 with the packed weight; above, with the weight unpacked in the inputs' type."""
    layer = Layer(QuantSpec(35, 300, 2, 3, 16, 256, 0), machine)
    layer.check(inputs(machine, 64, 300, dtype), "a16")
    x = inputs(machine, 65, 300, dtype)
    want = torch.nn.functional.linear(x, layer.weight.to(dtype).to(x.device), layer.bias.to(dtype).to(x.device))
    assert torch.equal(layer.prepared(x, "a16"), want)


def test_refusals(machine):
    layer = Layer(QuantSpec(32, 256, 2, 2, 16, 256, 0), machine)
    with pytest.raises(ConfigError, match="x on meta and a weight on"):
        layer.prepared(torch.empty(1, 256, device="meta"), "a16")
    with pytest.raises(ConfigError, match="layer 1 has 512 columns, need 256"):
        layer.prepared.together([Layer(QuantSpec(32, 512, 2, 2, 16, 256, 0), machine).prepared], inputs(machine, 1, 256), "a16")
    idx, cb, gs, *rest = layer.tensors
    with pytest.raises(ConfigError, match="gs: got .*need bfloat16"):
        ops.prepare_linear(idx, cb, gs.half(), *rest, layer.spec)


def test_tensors_at_odd_addresses_are_copied(machine):
    layer = Layer(QuantSpec(32, 256, 2, 2, 16, 256, 0), machine)
    idx = layer.tensors[0]
    shifted = torch.empty(idx.numel() + 4, dtype=torch.uint8, device=idx.device)[4:].view(idx.shape).copy_(idx)
    prepared = ops.prepare_linear(shifted, *layer.tensors[1:], layer.spec)
    x = inputs(machine, 1, 256)
    assert torch.equal(prepared(x, "a16"), layer.prepared(x, "a16"))


def test_module_and_operator(machine, monkeypatch):
    """VQLinear by its kernels, layers that follow each other on one input, and the operator that torch.compile takes."""
    with monkeypatch.context() as patch:
        patch.setenv("GPTVQ_BACKEND", "reference")          # on a GPU the kernels take no CPU tensors
        weights = [random_weight(QuantSpec(rows, 384, 2, 2, 16, 192, 64), seed) for seed, rows in enumerate((48, 32))]
        dense = [w.dequantize().double() for w in weights]
    layers = [VQLinear.from_weight(w).to(machine.device) for w in weights]
    with torch.no_grad():
        for turn in range(3):
            x = inputs(machine, 2, 384, seed=turn)
            for layer, W in zip(layers, dense):
                want = x.cpu().double() @ W.T
                assert relative(layer(x).cpu(), want) < 1e-4
                assert relative(ops.linear(x, *layer._decode_tables(), None, layer.spec).cpu(), want) < 1e-4
    assert layers[0]._followers == (layers[1],)


@pytest.mark.parametrize("dtype", OUTPUT)
def test_the_operator_keeps_no_tensor(machine, dtype):
    """What it keeps would stay in the memory of the CUDA graph that it was first called for."""
    layer, x = Layer(QuantSpec(48, 384, 2, 2, 16, 192, 64), machine), inputs(machine, 2, 384, dtype)
    bias = layer.bias.to(machine.device, dtype)
    want = ops.prepare_linear(*layer.tensors[:5], bias, layer.spec)(x, "a16")
    for _ in range(2):
        given = [layer.tensors[0], *(t.clone() for t in layer.tensors[1:5]), bias.clone()]
        gone = [weakref.ref(t) for t in given[1:]]
        held = {id(t) for t in gc.get_objects() if type(t) is torch.Tensor}
        assert torch.equal(ops.linear(x, *given, layer.spec), want)
        machine.guarded.check()
        assert all(id(t) in held for t in gc.get_objects() if type(t) is torch.Tensor)
        del given
        assert not any(ref() is not None for ref in gone)


@pytest.mark.gpu
@pytest.mark.parametrize("form", sorted(FORMATS), ids=lambda f: f"{f[0]}d{f[1]}b")
def test_cuda_graph_and_streams(form, monkeypatch):
    """Captured and replayed, and on a stream of its own: the same bits as a plain call."""
    monkeypatch.setenv("GPTVQ_BACKEND", "cuda")
    layer = Layer(QuantSpec(512, 2048, *form, 32, 256, 64), Machine("cuda", None, None))
    x, stream = torch.randn(3, 2048, device="cuda", dtype=torch.float16), torch.cuda.Stream()
    want = layer.prepared(x, "a16").clone()
    with torch.cuda.stream(stream):
        stream.wait_stream(torch.cuda.default_stream())
        assert torch.equal(layer.prepared(x, "a16"), want)
    torch.cuda.synchronize()
    graph, given = torch.cuda.CUDAGraph(), torch.zeros_like(x)
    with torch.cuda.graph(graph):
        y = layer.prepared(given, "a16")
    given.copy_(x)
    graph.replay()
    assert torch.equal(y, want)
