"""The vLLM plugin: every rank's share of packed layers, computed as vLLM would make, load and call them.

Against vLLM itself where it is installed, else against tests/use/vllm_stub.py, which has its documented interface;
the names of the tests say which.
"""
import importlib
import importlib.util
import sys

import pytest
import torch

from gptvq.errors import ConfigError, FormatError
from gptvq.spec import LAYOUT_VERSION, QuantSpec
from packed_cases import random_weight

HIDDEN, HEAD, HEADS, KV, MLP = 64, 16, 4, 2, 96
PREFIX = "model.layers.0"
SPECS = {"self_attn.q_proj": QuantSpec(64, 64, 2, 2, 16, 64), "self_attn.k_proj": QuantSpec(32, 64, 2, 3, 16, 32),
         "self_attn.o_proj": QuantSpec(64, 64, 1, 3, 64, 32, 16), "mlp.gate_proj": QuantSpec(96, 64, 2, 2, 48, 64),
         "mlp.up_proj": QuantSpec(96, 64, 4, 2, 32, 64), "mlp.down_proj": QuantSpec(64, 96, 2, 2, 16, 32),
         "router": QuantSpec(8, 64, 2, 2, 8, 32)}
AGAINST = "vllm" if importlib.util.find_spec("vllm") is not None else "stub"
MAPPING = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


@pytest.fixture(scope="module", params=[AGAINST])
def vllm(request):
    """(gptvq.vllm, vLLM's module of linears, a function that sets rank and number of ranks)."""
    if request.param == "vllm":
        linear = importlib.import_module("vllm.model_executor.layers.linear")
        from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
        patch, asking = pytest.MonkeyPatch(), (linear, importlib.import_module("vllm.model_executor.parameter"))

        def ranked(rank, size):
            for module in asking:
                patch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
                patch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)

        with set_current_vllm_config(VllmConfig(device_config=DeviceConfig(device="cpu"))):
            yield importlib.import_module("gptvq.vllm"), linear, ranked
        patch.undo()
        return
    from use import vllm_stub
    names = vllm_stub.install()
    yield importlib.import_module("gptvq.vllm"), sys.modules["vllm.model_executor.layers.linear"], lambda rank, size: vllm_stub.ranks.update(
        rank=rank, size=size)
    for name in [*names, "gptvq.vllm"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def weights():
    return {name: random_weight(spec, i) for i, (name, spec) in enumerate(SPECS.items())}


@pytest.fixture
def config(vllm):
    settings = {"layout_version": LAYOUT_VERSION, "version": "0", "quant_method": "gptvq", "config": None, "bits_per_value": 2.0,
                "calibration": None, "layers": {f"{PREFIX}.{name}": spec.to_dict() for name, spec in SPECS.items()}, "experts": ["model.layers.1.mlp.experts"]}
    config = vllm[0].GptvqVllmConfig.from_config(settings)
    config.packed_modules_mapping = MAPPING
    return config


def feed(layer, packed, shard_id=None):
    for buffer, tensor in packed.buffers.items():
        layer.get_parameter(buffer).weight_loader(layer.get_parameter(buffer), tensor, *([] if shard_id is None else [shard_id]))


def finish(layer, x):
    layer.quant_method.process_weights_after_loading(layer)
    return layer.quant_method.apply(layer, x)


def near(got, want):
    """The kernels take x as 16-bit integers: 1e-4 of the output."""
    assert got.shape == want.shape and float((got - want).norm() / want.norm()) < 3e-4


def test_registering_twice_is_once(vllm):
    quantization = importlib.import_module("vllm.model_executor.layers.quantization")
    vllm[0].register()
    vllm[0].register()
    assert quantization.QUANTIZATION_METHODS.count("gptvq") == 1


@pytest.mark.parametrize("size", [1, 2, 4])
def test_fused_query_key_value_with_a_dense_part(vllm, weights, config, size):
    """4 query heads, 2 key and value heads; v is dense; with 4 ranks two of them hold the same key head."""
    module, linear, ranked = vllm
    torch.manual_seed(0)
    v, x = torch.randn(KV * HEAD, HIDDEN), torch.randn(5, HIDDEN)
    q, k = (x @ weights[f"self_attn.{name}_proj"].dequantize().T for name in "qk")
    whole = {"q": q, "k": k, "v": x @ v.T}
    for rank in range(size):
        ranked(rank, size)
        layer = linear.QKVParallelLinear(HIDDEN, HEAD, HEADS, KV, bias=False, quant_config=config, prefix=f"{PREFIX}.self_attn.qkv_proj",
                                         params_dtype=torch.float32)
        feed(layer, weights["self_attn.q_proj"], "q")
        feed(layer, weights["self_attn.k_proj"], "k")
        layer.weight.weight_loader(layer.weight, v, "v")
        heads = {"q": HEADS // size, "k": max(1, KV // size), "v": max(1, KV // size)}
        first = {"q": rank * heads["q"], "k": rank * KV // size, "v": rank * KV // size}
        near(finish(layer, x), torch.cat([whole[n][:, first[n] * HEAD:(first[n] + heads[n]) * HEAD] for n in "qkv"], -1))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_fused_gate_up_and_row_parallel_down(vllm, weights, config, size):
    """gate and up side by side on each rank; the sum of the ranks' down products is the whole."""
    module, linear, ranked = vllm
    torch.manual_seed(1)
    x, h = torch.randn(3, HIDDEN), torch.randn(3, MLP)
    gate, up = (x @ weights[f"mlp.{name}_proj"].dequantize().T for name in ("gate", "up"))
    total = torch.zeros(3, HIDDEN)
    for rank in range(size):
        ranked(rank, size)
        part = slice(rank * MLP // size, (rank + 1) * MLP // size)
        layer = linear.MergedColumnParallelLinear(HIDDEN, [MLP, MLP], bias=False, quant_config=config, prefix=f"{PREFIX}.mlp.gate_up_proj",
                                                  params_dtype=torch.float32)
        feed(layer, weights["mlp.gate_proj"], 0)
        feed(layer, weights["mlp.up_proj"], 1)
        near(finish(layer, x), torch.cat([gate[:, part], up[:, part]], -1))
        down = linear.RowParallelLinear(MLP, HIDDEN, bias=False, quant_config=config, prefix=f"{PREFIX}.mlp.down_proj",
                                        params_dtype=torch.float32)
        feed(down, weights["mlp.down_proj"])
        total += finish(down, h[:, part])
    near(total, h @ weights["mlp.down_proj"].dequantize().T)


def test_block_scales_bias_and_dtypes(vllm, weights, config):
    module, linear, ranked = vllm
    x, total = torch.randn(2, HIDDEN, dtype=torch.bfloat16), torch.zeros(2, HIDDEN)
    for rank in range(2):
        ranked(rank, 2)
        layer = linear.RowParallelLinear(HIDDEN, HIDDEN, bias=False, quant_config=config, prefix=f"{PREFIX}.self_attn.o_proj",
                                         params_dtype=torch.bfloat16)
        feed(layer, weights["self_attn.o_proj"])
        y = finish(layer, x[:, rank * 32:(rank + 1) * 32])
        assert y.dtype == torch.bfloat16
        total += y.float()
    want = x.float() @ weights["self_attn.o_proj"].dequantize().T
    assert float((total - want).norm() / want.norm()) < 0.01
    ranked(1, 2)
    layer = linear.ReplicatedLinear(HIDDEN, 8, bias=False, quant_config=config, prefix=f"{PREFIX}.router", params_dtype=torch.float32)
    feed(layer, weights["router"])
    bias = torch.arange(8.0)
    layer.quant_method.process_weights_after_loading(layer)
    near(layer.quant_method.apply(layer, x.float(), bias), x.float() @ weights["router"].dequantize().T + bias)


def test_memory_is_the_packed_bytes(vllm, weights, config):
    module, linear, ranked = vllm
    ranked(1, 2)
    layer = linear.ColumnParallelLinear(HIDDEN, 64, bias=False, quant_config=config, prefix=f"{PREFIX}.self_attn.q_proj",
                                        params_dtype=torch.float32)
    stored, half = sum(p.numel() * p.element_size() for p in layer.parameters()), weights["self_attn.q_proj"].nbytes / 2
    assert half <= stored <= half + 64 * sum(p.element_size() for p in layer.parameters())     # a part ends aligned


def test_other_layers_are_left_to_vllm(vllm, config):
    module, linear, ranked = vllm
    ranked(0, 1)
    assert config.get_quant_method(torch.nn.Embedding(4, 4), "model.embed_tokens") is None
    layer = linear.ReplicatedLinear(8, 8, bias=False, quant_config=config, prefix="lm_head")
    assert isinstance(layer.quant_method, linear.UnquantizedLinearMethod)
    with pytest.raises(ConfigError, match="packed output heads and embeddings cannot be served by vLLM yet"):
        config.get_quant_method(torch.nn.Embedding(4, 4), next(iter(config.layers)))
    with pytest.raises(ConfigError, match="model.embed_tokens: packed output heads"):
        type(config).from_config({"tied": {"model.embed_tokens": "lm_head"}})
    with pytest.raises(ConfigError, match="mixtures of experts"):
        config.get_quant_method(torch.nn.Module(), "model.layers.1.mlp.experts")


def test_what_does_not_fit_is_named(vllm, weights, config):
    module, linear, ranked = vllm

    def down():
        return linear.RowParallelLinear(MLP, HIDDEN, bias=False, quant_config=config, prefix=f"{PREFIX}.mlp.down_proj",
                                        params_dtype=torch.float32)

    ranked(0, 1)
    layer = down()
    for buffer, tensor in list(weights["mlp.down_proj"].buffers.items())[:-1]:
        layer.get_parameter(buffer).weight_loader(layer.get_parameter(buffer), tensor)
    with pytest.raises(FormatError, match="down_proj.gs' is missing"):
        layer.quant_method.process_weights_after_loading(layer)
    with pytest.raises(FormatError, match="down_proj.idx: got torch.uint8"):
        layer.idx.weight_loader(layer.idx, weights["mlp.up_proj"].buffers["idx"])
    feed(layer, weights["mlp.down_proj"])
    layer.gs.data[5] = torch.inf
    with pytest.raises(FormatError, match="down_proj.gs: holds 1 values that are not finite"):
        layer.quant_method.process_weights_after_loading(layer)
    with pytest.raises(FormatError, match="part 3"):
        layer.idx.weight_loader(layer.idx, weights["mlp.down_proj"].buffers["idx"], 3)
    ranked(1, 32)
    with pytest.raises(ConfigError, match="column 3"):
        down()
    ranked(0, 1)
    with pytest.raises(ConfigError, match="cannot be served"):
        linear.ColumnParallelLinear(HIDDEN + 2, 64, bias=False, quant_config=config, prefix=f"{PREFIX}.self_attn.q_proj",
                                    params_dtype=torch.float32)
    with pytest.raises(FormatError):
        module.GptvqVllmConfig.from_config({"layout_version": LAYOUT_VERSION + 1, "layers": {}})
