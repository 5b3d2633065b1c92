"""DenseHead: an output head left dense, whose product of one bfloat16 token is our own kernel."""
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import gptvq
from gptvq import ops
from gptvq.backends import native
from gptvq.dense import DenseHead, quicken
from gptvq.errors import ConfigError

pytestmark = pytest.mark.skipif(not native.serves(torch.device("cpu")), reason="gptvq._C was not built")
SHAPES = [(1, 1), (3, 2), (4, 31), (5, 32), (7, 33), (8, 64), (130, 96), (257, 1000), (1024, 576)]


def head(rows, cols, bias=True, dtype=torch.bfloat16):
    torch.manual_seed(rows * 1000 + cols)
    made = nn.Linear(cols, rows, bias=bias, dtype=dtype).requires_grad_(False)
    made.__class__ = DenseHead
    return made


def kernel_calls(monkeypatch):
    seen = []
    monkeypatch.setattr(ops, "matvec", lambda *args, inner=ops.matvec: (seen.append(1), inner(*args))[1])
    return seen


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows, cols", SHAPES)
def test_against_float64(monkeypatch, rows, cols, bias, threads):
    layer, seen = head(rows, cols, bias), kernel_calls(monkeypatch)
    x = torch.randn(1, 1, cols).bfloat16()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = layer(x)
    finally:
        torch.set_num_threads(before)
    assert seen and y.dtype == torch.bfloat16 and y.shape == (1, 1, rows)
    need = layer.weight.double() @ x[0, 0].double() + (layer.bias.double() if bias else 0)
    power = layer.weight.double().abs() @ x[0, 0].double().abs() + 1
    assert ((y[0, 0].double() - need).abs() <= 2**-8 * need.abs() + 1e-6 * power).all()


def test_same_bits_for_any_number_of_threads():
    layer, x, before = head(4099, 576), torch.randn(576).bfloat16(), torch.get_num_threads()
    outputs = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            outputs.append(layer(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(outputs[0], y) for y in outputs[1:])


def test_values_that_are_not_finite_and_tiny_ones():
    layer = head(4, 64, bias=False)
    x = torch.ones(64).bfloat16()
    layer.weight[0, 3] = torch.inf
    layer.weight[1, 60] = torch.nan
    layer.weight[2] = 1e-38
    y = layer(x)
    assert y[0] == torch.inf and y[1].isnan() and torch.allclose(y[2].double(), layer.weight[2].double().sum(), rtol=2**-8)


def test_a_strided_weight_and_input():
    layer = head(24, 40)
    layer.weight = nn.Parameter(layer.weight.new_empty(40, 24).normal_().T, requires_grad=False)
    x = torch.randn(80).bfloat16()[::2]
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("case", ["two tokens", "no token", "float32", "gradient of x", "gradient of the weight", "autocast",
                                  "operators are seen", "func"])
def test_everything_else_is_nn_linear(monkeypatch, case):
    dtype = torch.float32 if case == "float32" else torch.bfloat16
    layer, seen, x = head(16, 32, dtype=dtype), kernel_calls(monkeypatch), torch.randn(1, 32).to(dtype)
    if case == "two tokens":
        x = torch.randn(2, 32).bfloat16()
    elif case == "no token":
        x = x[:0]
    elif case == "gradient of x":
        x.requires_grad_()
    elif case == "gradient of the weight":
        layer.requires_grad_()
    if case == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
    elif case == "operators are seen":
        traced = torch.fx.symbolic_trace(layer)
        y = traced(x)
    elif case == "func":
        y = torch.func.vmap(layer)(x)
    else:
        y = layer(x)
    assert not seen
    torch.testing.assert_close(y, F.linear(x, layer.weight, layer.bias), rtol=2**-6, atol=1e-2)
    if case.startswith("gradient"):
        y.sum().backward()


def test_wrong_inputs_say_what_nn_linear_says():
    with pytest.raises(RuntimeError, match="shape"):
        head(16, 32)(torch.randn(32, 1).bfloat16())


def test_the_compiled_module_checks_its_arguments():
    weight, x, y = torch.zeros(4, 8).bfloat16(), torch.zeros(8).bfloat16(), torch.zeros(4).bfloat16()
    for wrong, name in (((weight.float(), x, None, y), "weight"), ((weight, x[:7], None, y), "x"), ((weight, x, None, y[:3]), "y"),
                        ((weight, x, torch.zeros(3), y), "bias"), ((weight[0], x, None, y), "weight"), ((weight.T, x, None, y), "weight")):
        with pytest.raises(ConfigError, match=f"matvec: {name}: got .* need"):
            native._call(native._C.matvec, *wrong, 1)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    return LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                        vocab_size=256, max_position_embeddings=128, tie_word_embeddings=True)).bfloat16().eval()


@torch.no_grad()
def test_a_model_with_a_quick_head_is_the_same_model(model):
    quick = quicken(copy.deepcopy(model))
    assert type(quick.lm_head) is DenseHead and quick.lm_head.weight is quick.get_input_embeddings().weight
    assert quick.state_dict().keys() == model.state_dict().keys()
    x = torch.randn(64).bfloat16()
    assert torch.equal(pickle.loads(pickle.dumps(quick.lm_head))(x), quick.lm_head(x))
    compiled = torch.compile(quick.lm_head, fullgraph=True)
    torch.testing.assert_close(compiled(x), quick.lm_head(x), rtol=2**-7, atol=1e-3)
    assert type(quicken(quick).lm_head) is DenseHead and isinstance(quicken(nn.Sequential()), nn.Sequential)


def test_packed_models_have_it(monkeypatch, model, tmp_path):
    report = gptvq.quantize(copy.deepcopy(model), tmp_path / "packed", "2d-2.25", calibration=torch.randint(0, 256, (4, 32)), samples=4,
                            sequence_length=32)
    seen = kernel_calls(monkeypatch)
    for packed in (report.model, gptvq.load(tmp_path / "packed"), AutoModelForCausalLM.from_pretrained(tmp_path / "packed")):
        assert type(packed.lm_head) is DenseHead and packed.lm_head.weight is packed.get_input_embeddings().weight
        seen.clear()
        packed.generate(torch.randint(1, 256, (1, 5)), max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
        assert len(seen) == 6                           # of the prompt, too, transformers asks for its last token alone
    packed.save_pretrained(tmp_path / "again")
    assert type(gptvq.load(tmp_path / "again").lm_head) is DenseHead
