"""y = W x of gptvq._C on every instruction set against float64, and what happens with odd inputs, threads and corrupt tables."""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linear_cases import ACTIVATIONS, CANARY, INSTRUCTION_SETS, LAYERS, TYPES, Layer, _C, fields, raw, relative
from packed_cases import spec_id, specs

from gptvq.backends import reference
from gptvq.spec import FORMATS, QuantSpec

TOKENS = (1, 2, 3, 4, 5, 9, 17, 33)
FAST = [(2, 2), (2, 3), (2, 4), (1, 3)]         # formats for tests that need not see all of them
each_set = pytest.mark.parametrize("isa", INSTRUCTION_SETS)
each_activation = pytest.mark.parametrize("activations", ACTIVATIONS)


def form_id(form):
    return f"{form[0]}d{form[1]}b"


def assert_close(layer, x, activations, y):
    want, terms = layer.oracle(x, activations)
    assert relative(y, want) <= 1e-6 or torch.equal(y.double(), want)
    assert ((y.double() - want).abs() <= 1e-6 * terms).all()


@each_set
@pytest.mark.parametrize("spec", LAYERS, ids=spec_id)
def test_against_float64_with_the_same_activations(spec, isa):
    for activations in ACTIVATIONS:
        layer = Layer(spec, isa, bias=activations != "a8")
        for tokens in TOKENS:
            x = torch.randn(tokens, spec.cols) * torch.exp2(torch.randint(-8, 8, (tokens, 1)))
            y = layer.run(x, activations)
            assert_close(layer, x, activations, y)
            for dtype in (torch.float16, torch.bfloat16):
                x = x.to(dtype)
                assert torch.equal(layer.run(x, activations), layer.run(x.float(), activations).to(dtype))


@each_set
@pytest.mark.parametrize("spec", LAYERS, ids=spec_id)
def test_unpacks_the_weights_bit_for_bit(spec, isa):
    layer = Layer(spec, isa)
    for dtype, number in TYPES.items():
        want = reference.dequantize(*layer.tensors.values(), spec, dtype)
        for row, rows in {(0, spec.rows), (spec.rows // 32 * 16, spec.rows - spec.rows // 32 * 16), (0, min(spec.rows, 16))}:
            memory = torch.full((rows + 2, spec.cols), CANARY, dtype=dtype)
            layer.handle.unpack(row, rows, memory[1:].data_ptr(), number, 2)
            assert torch.equal(memory[1:-1], want[row: row + rows])
            assert (memory[0] == CANARY).all() and (memory[-1] == CANARY).all(), "wrote past the rows"
    for row, rows in ((1, 15), (0, spec.rows - 1 if spec.rows % 16 != 1 else -1), (0, spec.rows + 1), (-16, 16), (16, -16), (16, 2**63 - 16)):
        with pytest.raises(ValueError, match="rows: got"):
            layer.handle.unpack(row, rows, 0, 0, 1)


@given(specs(), st.integers(0, 2**31), st.sampled_from((1, 2, 3, 4, 6, 8, 16, 21)), st.sampled_from(sorted(ACTIVATIONS)), st.sampled_from(INSTRUCTION_SETS),
       st.booleans())
def test_against_float64_anywhere(spec, seed, tokens, activations, isa, bias):
    layer = Layer(spec, isa, seed, bias)
    x = torch.randn(tokens, spec.cols, generator=torch.Generator().manual_seed(seed))
    assert_close(layer, x, activations, layer.run(x, activations, threads=2))


@each_set
@pytest.mark.parametrize("form", sorted(FORMATS), ids=form_id)
@pytest.mark.parametrize("shape", [(256, 256, 16, 256, 64), (272, 1024, 32, 512, 0), (300, 700, 4, 128, 32), (300, 700, 1, 700, 16)],
                         ids=str)
def test_error_of_the_activations(form, shape, isa):
    """Against x itself: what rounding activations to integers costs."""
    rows, cols, group_rows, group_cols, scale = shape
    layer = Layer(QuantSpec(rows, cols, *form, group_rows, group_cols, scale), isa)
    assert layer.handle.fast == (group_rows >= 16 or max(1, 4 // group_rows) * layer.spec.codewords <= 16)
    x = torch.randn(5, cols)
    want, _ = layer.oracle(x, "fp32")
    for activations, most in (("a16", 1e-4), ("a8", 1.5e-2), ("fp32", 1e-6)):
        assert relative(layer.run(x, activations), want) <= most


@each_activation
@pytest.mark.parametrize("form", FAST, ids=form_id)
def test_instruction_sets_and_threads_agree(form, activations):
    """More threads than parts, processors or rows change no bit; another instruction set adds in another order."""
    spec = QuantSpec(403, 520, *form, 16, 256, 64)
    x = torch.randn(9, spec.cols)
    results = []
    for isa in INSTRUCTION_SETS:
        layer = Layer(spec, isa)
        results.append(layer.run(x, activations))
        assert all(torch.equal(layer.run(x, activations, threads), results[-1]) for threads in (2, 7, 1000, 0, -3))
    assert all(relative(y, results[0]) <= 1e-6 for y in results)


@each_set
@each_activation
def test_more_tokens_than_caches_hold(isa, activations):
    """They come in parts, the last one smaller, to rows that take turns on two threads."""
    layer = Layer(QuantSpec(80, 4096, 2, 4, 16, 256, 64), isa)
    x = torch.randn(150, 4096)
    y = layer.run(x, activations, threads=2)
    assert_close(layer, x, activations, y)
    few = layer.run(x[140:], activations)       # computed in other company, perhaps by other instructions
    assert relative(y[140:], few) <= 1e-6


@each_set
def test_takes_turns_with_the_products_of_torch(isa):
    """Both may use the processor's tile registers, each in its own shape."""
    layer = Layer(QuantSpec(64, 256, 2, 4, 16, 256, 64), isa)
    x, weight = torch.randn(24, 256), torch.randn(256, 256, dtype=torch.bfloat16)
    product = x.bfloat16() @ weight
    y = layer.run(x)
    for _ in range(20):
        assert torch.equal(x.bfloat16() @ weight, product)
        assert torch.equal(layer.run(x), y)


@each_set
def test_same_result_every_time(isa):
    layer = Layer(QuantSpec(320, 512, 2, 2, 16, 128, 32), isa)
    x = torch.randn(3, 512)
    first = layer.run(x, "a16", 2)
    assert all(torch.equal(layer.run(x, "a16", 2), first) for _ in range(100))


@each_set
@each_activation
@pytest.mark.parametrize("form", FAST, ids=form_id)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_not_finite_stays_in_its_token(value, form, activations, isa):
    layer = Layer(QuantSpec(40, 300, *form, 16, 96, 32), isa)
    x = torch.randn(7, 300)
    clean = layer.run(x, activations)
    for token, column in ((0, 0), (3, 95), (6, 299)):
        spoiled = x.clone()
        spoiled[token, column] = value
        y = layer.run(spoiled, activations)
        assert not y[token].isfinite().any()
        assert activations == "fp32" or y[token].isnan().all()
        others = [t for t in range(7) if t != token]
        # A token's neighbours decide in which company it is computed, not what comes out.
        assert torch.equal(y[others], clean[others])


@each_set
@each_activation
def test_zeros_and_very_small_and_large_inputs(activations, isa):
    layer = Layer(QuantSpec(40, 300, 2, 2, 16, 96, 32), isa)
    assert torch.equal(layer.run(torch.zeros(3, 300), activations), layer.bias.expand(3, 40))
    assert torch.equal(layer.run(-torch.zeros(3, 300), activations), layer.bias.expand(3, 40))
    assert torch.equal(Layer(layer.spec, isa, bias=False).run(torch.zeros(1, 300), activations), torch.zeros(1, 40))
    for size in (1e-45, 1e-35, 1e-30, 1e-20, 1e20, 1e30):
        x = torch.randn(2, 300) * size
        y = layer.run(x, activations)
        assert y.isfinite().all()
        assert_close(layer, x, activations, y)
    one = torch.zeros(1, 300)                     # a span of zeros beside one that is not, and all weights of a column
    for column in (0, 31, 32, 299):
        one[0, column] = -3
        assert_close(layer, one, activations, layer.run(one, activations))


@each_set
@each_activation
@pytest.mark.parametrize("form", sorted(FORMATS), ids=form_id)
def test_largest_products_do_not_saturate(form, activations, isa):
    """All centroids -128, which no checkpoint of ours holds, or +-127, times the largest activations of either sign."""
    for group_rows, scale in ((16, 64), (4, 0), (1, 16)):
        spec = QuantSpec(35, 600, *form, group_rows, 320, scale)
        shape = (spec.row_groups, spec.strips)
        value = 127 if spec.signs else -128
        layer = Layer(spec, isa, bias=False, cb=torch.full((*shape, spec.dim, spec.codewords), value, dtype=torch.int8),
                      gs=torch.full(shape, 0.5).bfloat16())
        for x in (torch.ones(4, 600), -torch.ones(4, 600), torch.tensor([1.0, -1.0]).repeat(4, 300)):
            want, terms = layer.oracle(x, activations)
            assert ((layer.run(x, activations).double() - want).abs() <= 1e-6 * terms).all()


@each_set
@pytest.mark.parametrize("form", sorted(FORMATS), ids=form_id)
def test_corrupt_buffers(form, isa):
    """Any bytes are codes of some centroids; a group scale that is not finite spoils the rows of its group alone."""
    for group_rows in (16, 4, 1):
        spec = QuantSpec(35, 200, *form, group_rows, 64, 32)
        random = {name: torch.randint(0, 256, shape, dtype=torch.uint8) for name, (shape, dtype) in spec.buffer_shapes().items()
                  if dtype == "uint8"}
        layer = Layer(spec, isa, **random)
        x = torch.randn(5, 200)
        for activations in ACTIVATIONS:
            assert_close(layer, x, activations, layer.run(x, activations))
        for value in (torch.inf, torch.nan):
            gs = layer.tensors["gs"].clone()
            gs[-1, -1] = value
            for activations in ACTIVATIONS:
                y, good = Layer(spec, isa, **random, gs=gs).run(x, activations), layer.run(x, activations)
                first = (spec.row_groups - 1) * group_rows
                assert torch.equal(y[:, :first], good[:, :first]) and not y[:, first:].isfinite().any()


@each_set
def test_rounding_to_half_and_bfloat(isa):
    """x is 0, so that y is the bias, rounded: all exponents, the ties of both types, infinity and NaN."""
    spec = QuantSpec(32001, 4, 1, 2, 16, 4)
    bits = torch.randint(-2**31, 2**31 - 1, (spec.rows,)).to(torch.int32)
    bits[:8000] &= ~0xFFF
    bits[8000:16000] &= ~0x7FFF
    bits[16000:24000] = (bits[16000:24000] & ~0x7F800000) | torch.randint(96, 115, (8000,)).to(torch.int32) << 23
    values = bits.view(torch.float32)
    layer = Layer(spec, isa, bias=values)
    for dtype in TYPES:
        y, want = layer.run(torch.zeros(2, 4, dtype=dtype)), values.to(dtype).expand(2, -1)
        assert torch.equal(y.nan_to_num(7), want.nan_to_num(7)) and torch.equal(y.isnan(), want.isnan())


@each_set
def test_several_layers_in_one_call(isa):
    """Those that take the same activations share them, others get their own: the company changes no bit."""
    shapes = [(48, 2, 2, 16, 128, 32), (33, 2, 3, 16, 128, 32), (20, 2, 2, 16, 128, 16), (16, 1, 3, 16, 320, 0), (50, 2, 2, 4, 128, 32),
              (35, 2, 4, 16, 128, 32), (48, 2, 2, 16, 128, 32), (18, 4, 2, 32, 128, 32), (16, 4, 3, 32, 128, 32)]
    layers = [Layer(QuantSpec(rows, 320, *rest), isa, seed=i) for i, (rows, *rest) in enumerate(shapes)]
    layers.insert(2, Layer(QuantSpec(21, 320, 2, 2, 5, 20), isa))
    assert [layer.handle.fast for layer in layers] == [index != 2 for index in range(10)]
    x = torch.randn(3, 320)
    for activations, code in ACTIVATIONS.items():
        outputs = [torch.full((3, layer.spec.rows), torch.nan) for layer in layers]
        _C.linear([layer.handle for layer in layers], x.data_ptr(), 0, 3, [y.data_ptr() for y in outputs], code, 2)
        assert all(torch.equal(y, layer.run(x, activations)) for layer, y in zip(layers, outputs))


@each_activation
def test_no_tokens(activations):
    layer = Layer(QuantSpec(20, 40, 2, 2, 16, 32))
    assert layer.run(torch.empty(0, 40), activations).shape == (0, 20)
    layer.handle.run(0, 0, 0, 0, ACTIVATIONS[activations], 1)


@pytest.mark.parametrize("name, change, message", [
    ("idx", {"shape": (2, 2, 64)}, r"idx: got uint8 \(2, 2, 64\), need uint8 \(2, 2, 128\)"),
    ("idx", {"dtype": "int8"}, "idx: got int8"),
    ("idx", {"strides": (1, 2, 4)}, "idx: got strides .* need a contiguous tensor"),
    ("idx", {"address": 0}, "idx: got a tensor without storage"),
    ("cb", {"dtype": "uint8"}, "cb: got uint8"),
    ("cb", {"shape": (2, 2, 2, 8)}, r"cb: got int8 \(2, 2, 2, 8\), need int8 \(2, 2, 2, 16\)"),
    ("gs", {"dtype": "float16"}, "gs: got float16"),
    ("gs", {"strides": (1,)}, "gs: got strides"),
    ("sc", None, "sc: got None, need a tensor because the spec has block scales"),
    ("sc", {"shape": (2, 1, 8)}, r"sc: got uint8 \(2, 1, 8\)"),
    ("table", None, "scale table: got None"),
    ("table", {"dtype": "float64"}, "scale table: got float64"),
    ("bias", {"dtype": "float16"}, r"bias: got float16 \(20,\), need float32"),
    ("bias", {"shape": (19,)}, r"bias: got float32 \(19,\), need float32 \(20,\)"),
    ("bias", {"address": 0}, "bias: got a tensor without storage"),
])
def test_wrong_tensor_is_named(name, change, message):
    layer = Layer(QuantSpec(20, 40, 2, 2, 16, 32, 32))
    arguments = layer.tensors | {"bias": layer.bias}
    converted = {n: None if n == name and change is None else raw(t, **(change if n == name else {})) for n, t in arguments.items()}
    with pytest.raises(ValueError, match=message):
        _C.Linear(*converted.values(), fields(layer.spec), "")


def test_wrong_call_is_refused():
    layer, plain = Layer(QuantSpec(20, 40, 2, 2, 16, 32, 32)), QuantSpec(20, 40, 2, 2, 16, 32)
    x, y = torch.randn(2, 40), torch.empty(2, 20)
    good = {"x": x.data_ptr(), "type": 0, "tokens": 2, "y": y.data_ptr(), "activations": 0, "threads": 1}
    layer.handle.run(*good.values())
    for change, message in [({"tokens": -1}, "tokens: got -1"), ({"activations": 3}, "activations: got 3"), ({"type": 3}, "type: got 3"),
                            ({"type": -1}, "type: got -1"), ({"x": 0}, "x: got a tensor without storage"),
                            ({"y": 0}, "y: got a tensor without storage")]:
        with pytest.raises(ValueError, match=message):
            layer.handle.run(*(good | change).values())
    tensors = [raw(t) for t in layer.tensors.values()]
    with pytest.raises(ValueError, match="instruction set: got sse9, this processor and build have .*scalar"):
        _C.Linear(*tensors, None, fields(layer.spec), "sse9")
    with pytest.raises(ValueError, match="need None because the spec has no block scales"):
        _C.Linear(*tensors, None, fields(plain), "")
    with pytest.raises(ValueError, match="spec.rows: got 0"):
        _C.Linear(*tensors, None, (0, *fields(layer.spec)[1:]), "")
    other = Layer(QuantSpec(20, 44, 2, 2, 16, 44))
    with pytest.raises(ValueError, match="layer 1 has 44 columns, need 40"):
        _C.linear([layer.handle, other.handle], x.data_ptr(), 0, 2, [y.data_ptr()] * 2, 0, 1)
    with pytest.raises(ValueError, match="layer 1: got None"):
        _C.linear([layer.handle, None], x.data_ptr(), 0, 2, [y.data_ptr()] * 2, 0, 1)
    with pytest.raises(ValueError, match="got 1 outputs, need 2"):
        _C.linear([layer.handle] * 2, x.data_ptr(), 0, 2, [y.data_ptr()], 0, 1)
