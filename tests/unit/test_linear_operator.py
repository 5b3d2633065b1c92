"""The operators behind torch.compile: what a kernel remembers of the tensors it was prepared from, and which operator a graph takes."""
import gc
import pickle
import weakref

import pytest
import torch
from packed_cases import compiled_noting, random_weight
from torch import nn

from gptvq import QuantSpec, VQLinear, ops
from gptvq.backends import native
from gptvq.dense import DenseHead
from gptvq.errors import ConfigError

pytestmark = pytest.mark.skipif(not native.serves(torch.device("cpu")), reason="gptvq._C is not built here")
PLAIN, SCALES = QuantSpec(64, 96, 2, 2, 16, 32), QuantSpec(40, 96, 1, 3, 16, 96, 32)
NAMES = ("x", "idx", "cb", "gs", "sc", "table", "bias")


def arguments(spec=SCALES, x=None, bias=True, seed=0):
    """Those of the operators by name, of new tensors."""
    layer = VQLinear.from_weight(random_weight(spec, seed))
    tensors = torch.randn(3, spec.cols) if x is None else x, *layer._decode_tables(), torch.randn(spec.rows) if bias else None
    return {**dict(zip(NAMES, tensors)), "spec": spec.key, "activations": "a16"}


def called(args, operator=torch.ops.gptvq.linear_inference):
    return operator(*args.values())


def recalled(args):
    return native.recall(*args.values())


def fresh(args):
    """By a kernel prepared for this call."""
    return native.PreparedLinear(*list(args.values())[1:7], QuantSpec.from_key(args["spec"]))(args["x"], args["activations"])


def test_the_key_of_a_spec_is_its_fields():
    assert QuantSpec.from_key(SCALES.key) == SCALES and QuantSpec.from_key(PLAIN.key) is QuantSpec.from_key(PLAIN.key)
    assert len({spec.key for spec in (PLAIN, SCALES, QuantSpec(64, 96, 2, 2, 16, 64))}) == 3


@pytest.mark.parametrize("spec", [PLAIN, SCALES], ids=["plain", "scales"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("operator", ["linear", "linear_inference"])
def test_a_second_call_is_recalled_and_the_same(spec, bias, operator):
    args = arguments(spec, bias=bias)
    assert recalled(args) is None
    first = called(args, getattr(torch.ops.gptvq, operator))
    assert torch.equal(recalled(args), first) and torch.equal(called(args), first) and torch.equal(fresh(args), first)
    for x in (torch.randn(96), torch.randn(2, 1, 96).bfloat16(), torch.randn(1, 96).half(), torch.randn(511, 96)):
        for activations in ("a16", "a8", "fp32"):
            again = {**args, "x": x, "activations": activations}
            assert torch.equal(recalled(again), fresh(again)) and torch.equal(called(again), fresh(again))


@pytest.mark.parametrize("x", [torch.randn(96, 3).T, torch.randn(512, 96), torch.randn(0, 96), torch.randn(2, 192)[:, ::2]],
                         ids=["strided", "many", "none", "every other"])
def test_inputs_for_the_way_by_python(x):
    args = arguments()
    called(args)
    args["x"] = x
    assert recalled(args) is None
    torch.testing.assert_close(called(args), fresh(args))


@pytest.mark.parametrize("wrong, message", [({"x": torch.randn(3, 97)}, "need .* last dimension 96"), ({"x": torch.ones(3, 96, dtype=torch.int)}, "need torch.float32"),
                                            ({"activations": "a4"}, "got 'a4'")])
def test_wrong_inputs_say_so_when_a_kernel_is_known_too(wrong, message):
    args = arguments()
    called(args)
    with pytest.raises(ConfigError, match=message):
        called({**args, **wrong})


def test_what_is_no_tensor_is_not_recalled():
    args = arguments()
    called(args)
    for name in NAMES:
        assert recalled({**args, name: "no tensor"}) is None
    with pytest.raises(TypeError, match="need x, idx"):
        native.recall(1)


@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize("how", ["replaced", "in place", "in place by another view"])
def test_changes_are_seen(name, how):
    args = arguments()
    before, other = called(args), arguments(seed=1)[name]
    if how == "replaced":
        args[name] = other
    else:
        (args[name] if how == "in place" else args[name].view(-1)).copy_(other.view(args[name].shape if how == "in place" else -1))
    assert recalled(args) is None
    after = called(args)
    assert torch.equal(after, fresh(args)) and not torch.equal(after, before) and torch.equal(recalled(args), after)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_memory_that_is_used_again_is_not_taken_for_what_lay_there(dtype):
    """A bias in half precision is copied by the kernel; what it was copied from may not go before the copy."""
    args = arguments(PLAIN)
    for value in range(30):
        args["bias"] = None
        args["bias"] = torch.full((64,), float(value), dtype=dtype)
        assert torch.equal(called(args), fresh(args))


def test_another_view_of_the_same_memory_is_another_tensor():
    memory = torch.arange(256.0)
    args = {**arguments(PLAIN), "bias": memory[:64]}
    called(args)
    for other in (memory[::4], memory[:1].expand(64), memory[1:65], memory[:64]):
        args["bias"] = other
        assert torch.equal(called(args), fresh(args))
    for wrong in (memory[:3], memory[:64].view(torch.int32), torch.empty(0)):
        called({**args, "bias": memory[:64]})
        assert recalled({**args, "bias": wrong}) is None


def test_a_bias_that_is_empty_is_not_none():
    args = arguments(PLAIN, bias=False)
    called(args)
    assert recalled({**args, "bias": torch.empty(0)}) is None and recalled(args) is not None


def test_wrong_specs_and_pickles_without_a_key():
    args = arguments(PLAIN)
    for wrong in ("", "1,2", "a", PLAIN.key + ",1"):
        with pytest.raises(ConfigError, match="need the `key` of a QuantSpec"):
            called({**args, "spec": wrong})
    with pytest.raises(ConfigError, match="rows must be an integer >= 1"):
        QuantSpec.from_key("0" + PLAIN.key[2:])
    old = QuantSpec.__new__(QuantSpec)
    old.__setstate__(PLAIN.to_dict())
    assert old == PLAIN and old.key == PLAIN.key == pickle.loads(pickle.dumps(PLAIN)).key


def test_two_specs_of_one_buffer_do_not_mix():
    args = arguments(PLAIN)
    wide = {**args, "spec": QuantSpec(64, 96, 2, 2, 16, 96).key, "cb": args["cb"][:, :1].contiguous(), "gs": args["gs"][:, :1].contiguous()}
    for one in (args, wide, args):
        called(one)
        assert torch.equal(called(one), fresh(one))
    assert recalled(wide) is None


def test_inference_tensors_are_known_by_their_address():
    with torch.inference_mode():
        args = arguments()
        assert torch.equal(called(args), recalled(args))
        args["gs"] = args["gs"] * 2
        assert recalled(args) is None and torch.equal(called(args), fresh(args))


def test_a_backend_asked_for_later_is_taken(monkeypatch):
    args = arguments()
    called(args)
    monkeypatch.setenv("GPTVQ_BACKEND", "reference")
    assert recalled(args) is None
    monkeypatch.setattr(ops.BACKENDS["reference"], "linear", lambda x, *rest: x.new_full((), 7))
    assert called(args) == 7


def test_what_was_known_of_a_weight_goes_with_it():
    def entries():
        gc.collect()
        return len(native.linear.known)

    before, args = entries(), arguments()
    called(args)
    kernel = weakref.ref(native.linear.known[args["idx"]][2])
    assert entries() == before + 1 and recalled(args) is not None
    args["idx"] = args["idx"].clone()
    assert recalled(args) is None and entries() == before and kernel() is None


def targets(model, x):
    compiled, graphs = compiled_noting(model)
    y = compiled(x)
    return [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op.startswith("call_")], y


@pytest.mark.parametrize("wants", ["nothing", "x", "bias"])
@pytest.mark.parametrize("grad", [False, True])
def test_graphs_take_the_operator_without_gradients_under_no_grad_alone(wants, grad):
    layer, x = VQLinear.from_weight(random_weight(PLAIN), torch.randn(64)).requires_grad_(wants == "bias"), torch.randn(2, 96)
    x.requires_grad_(wants == "x")
    with torch.set_grad_enabled(grad):
        found, y = targets(nn.Sequential(layer), x)
    assert found == ["gptvq.linear" if grad else "gptvq.linear_inference"] and y.requires_grad == (grad and wants != "nothing")


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev])
def test_gradients_of_torch_func_inside_a_graph_are_right_or_refused(transform):
    """Dynamo says there that x asks for none."""
    head, layer = nn.Linear(96, 40, bias=False).bfloat16().requires_grad_(False), VQLinear.from_weight(random_weight(PLAIN))
    head.__class__ = DenseHead
    x = torch.randn(96).bfloat16()
    for module in (head, layer):
        def loss(x, module=module):
            return module(x).square().sum()

        want = transform(loss)(x)
        try:
            got = torch.compile(transform(loss), backend="aot_eager")(x)
        except torch._dynamo.exc.TorchRuntimeError:
            assert module is layer
        else:
            torch.testing.assert_close(got, want, rtol=2e-2, atol=0.1)


def test_exported_programs_keep_the_operator_with_gradients():
    program = torch.export.export(nn.Sequential(VQLinear.from_weight(random_weight(PLAIN))), (torch.randn(2, 96),), strict=False)
    assert "gptvq.linear.default" in [str(node.target) for node in program.graph.nodes]


def dense_head(dtype=torch.bfloat16):
    head = nn.Linear(96, 40).to(dtype)
    head.__class__ = DenseHead
    return head


@torch.no_grad()
@pytest.mark.parametrize("tokens, operator", [(1, "gptvq.matvec"), (2, None)])
def test_a_dense_head_multiplies_one_token_by_its_kernel_in_graphs_too(tokens, operator):
    head, x = dense_head(), torch.randn(1, tokens, 96).bfloat16()
    found, y = targets(nn.Sequential(head), x)
    assert (operator in found) == (operator is not None) and torch.equal(y, head(x))
    assert "gptvq.matvec" not in targets(nn.Sequential(dense_head(torch.float32)), x.float())[0]


@torch.no_grad()
def test_a_dense_head_takes_as_many_tokens_as_the_data_say():
    for dtype in (torch.bfloat16, torch.float32):
        head, x, mask = dense_head(dtype), torch.randn(5, 96).to(dtype), torch.tensor([True, False, True, True, False])
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            compiled = torch.compile(lambda x, mask, head=head: head(x[mask]), backend="eager", fullgraph=True)
            torch.testing.assert_close(compiled(x, mask), head(x[mask]), rtol=2**-7, atol=1e-2)


def test_the_operators_follow_the_rules_of_torch_library():
    torch.library.opcheck(torch.ops.gptvq.linear_inference.default, tuple(arguments(PLAIN).values()))
    torch.library.opcheck(torch.ops.gptvq.matvec.default, (torch.randn(1, 96).bfloat16(), torch.randn(40, 96).bfloat16(), None))
