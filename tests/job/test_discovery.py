"""What is found in a model: blocks, linears, shared inputs, fused experts."""
import pytest
import torch
from job.tiny_models import build, preset
from torch import nn

import gptvq
from gptvq.config import VQConfig
from gptvq.experts import is_fused, unfuse
from gptvq.hessian import Hessian
from gptvq.model import (
    Block,
    InputCollector,
    embed,
    find_blocks,
    linears,
    record_calls,
    unfuse_experts,
)
from gptvq.parts import largest_list

CPU = torch.device("cpu")


def opened(name, ids):
    """(model, blocks with their recorded calls, hidden states entering the first)."""
    model = build(name)
    blocks = find_blocks(model, ids[:1])
    unfuse_experts(model, blocks)
    record_calls(model, blocks, ids[:1], CPU)
    return model, blocks, embed(model, blocks, ids)


def groups(name, ids):
    model, blocks, hidden = opened(name, ids)
    found = linears(blocks[0].module, blocks[0].name)
    with torch.no_grad(), InputCollector(found, CPU) as inputs:
        for state in hidden:
            blocks[0](state)
            inputs.next_sample()
    shared = {}
    for full in found:
        shared.setdefault(id(inputs.hessian(full)), set()).add(full.removeprefix(blocks[0].name + "."))
    return list(shared.values())


def test_linears_with_one_input_share_one_hessian(ids):
    attention = [{"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}, {"self_attn.o_proj"}]
    assert groups("qwen2", ids) == attention + [{"mlp.gate_proj", "mlp.up_proj"}, {"mlp.down_proj"}]
    experts = [part for e in range(4) for part in ({f"mlp.experts.{e}.gate_proj", f"mlp.experts.{e}.up_proj"}, {f"mlp.experts.{e}.down_proj"})]
    assert groups("mixtral", ids) == attention + experts
    assert groups("gpt2", ids) == [{"attn.c_attn"}, {"attn.c_proj"}, {"mlp.c_fc"}, {"mlp.c_proj"}]


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt2"])
def test_blocks_run_as_the_model_runs_them(name, ids):
    """Gemma2 and Mistral mask differently from layer to layer, so each block needs its own arguments."""
    model, blocks, hidden = opened(name, ids)
    with torch.no_grad():
        want = model(ids, output_hidden_states=True, use_cache=False).hidden_states
        for i, block in enumerate(blocks[:-1]):
            hidden = [block(state) for state in hidden]
            assert torch.allclose(torch.cat(hidden), want[i + 1], atol=1e-5)


def test_the_hessian_is_that_of_the_inputs(ids):
    model, blocks, hidden = opened("llama", ids)
    q = model.model.layers[0].self_attn.q_proj
    seen = []
    handle = q.register_forward_pre_hook(lambda m, args: seen.append(args[0][0].double()))
    with torch.no_grad(), InputCollector({"q": q}, CPU) as inputs:
        for state in hidden:
            blocks[0](state)
            inputs.next_sample()
    handle.remove()
    x = torch.cat(seen)
    assert inputs.hessian("q").tokens == ids.numel() == len(x)
    assert torch.allclose(inputs.hessian("q").matrix().double(), 2 / len(x) * x.T @ x, rtol=1e-4, atol=1e-5)


def test_later_blocks_see_what_quantized_ones_give(ids, monkeypatch):
    """The Hessian of block 1 comes from the quantized block 0, not from the dense model."""
    seen = {}
    real = Hessian.matrix
    monkeypatch.setattr(Hessian, "matrix", lambda self: seen.setdefault(id(self), (self, real(self)))[1])
    report = gptvq.quantize(build(), None, preset(), calibration=ids)
    hessians = [matrix for _, matrix in seen.values()]
    model, blocks, hidden = opened("llama", ids)
    quantized = {name: module for name, module in report.model.named_modules() if isinstance(module, gptvq.VQLinear)}
    with torch.no_grad():
        dense = torch.cat([blocks[0](state) for state in hidden])
        for name, module in quantized.items():
            if name.startswith(blocks[0].name + "."):
                model.set_submodule(name, module)
        quantized = torch.cat([blocks[0](state) for state in hidden])
        for hidden, close in ((dense, False), (quantized, True)):
            x = blocks[1].module.input_layernorm(hidden).double().flatten(0, 1)
            assert torch.allclose(hessians[4].double(), 2 / len(x) * x.T @ x, rtol=1e-3, atol=1e-4) == close


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GptOssForCausalLM", "NemotronHForCausalLM", "Qwen3MoeForCausalLM"])
def test_unfused_experts_compute_the_same(name):
    """Plain, transposed and interleaved with biases and a clamped gate, without a gate."""
    import transformers

    prefix = name.removesuffix("ForCausalLM")
    settings = dict(hidden_size=32, intermediate_size=48, moe_intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
                    num_key_value_heads=2, vocab_size=64, num_local_experts=4, num_experts=4, num_experts_per_tok=2, n_routed_experts=4)
    if prefix == "NemotronH":
        settings |= dict(layers_block_type=["moe"], moe_latent_size=None)
    config = getattr(transformers, f"{prefix}Config")(**settings)
    config._experts_implementation = "eager"
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    fused = [module for module in model.modules() if is_fused(module)]
    assert len(fused) == 1
    for parameter in fused[0].parameters():
        parameter.data.normal_()
    x, index, weights = torch.randn(40, 32), torch.randint(0, 3, (40, 2)), torch.rand(40, 2)      # expert 3 stays idle
    unfused = unfuse(fused[0])
    with torch.no_grad():
        assert torch.allclose(unfused(x, index, weights), fused[0](x, index, weights), rtol=1e-5, atol=1e-4)
    before = sum(p.numel() for p in fused[0].parameters())
    assert sum(p.numel() for p in unfused.parameters()) == before
    assert all(isinstance(m, nn.Linear) for m in unfused.modules() if not list(m.children()) and list(m.parameters()))


def test_experts_of_another_kind_are_left_alone(ids, monkeypatch):
    """The same parameters and interface, other arithmetic: the numbers tell."""
    model = build("mixtral")
    kind = type(model.model.layers[0].mlp.experts)
    real = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, hidden_states, top_k_index, top_k_weights: 2 * real(
        self, hidden_states, top_k_index, top_k_weights))
    report = gptvq.quantize(model, None, preset(), calibration=ids)
    assert len(report.layers) == 8 and isinstance(model.model.layers[0].mlp.experts, kind)
    assert len(report.warnings) == 2 and all("were left dense" in w for w in report.warnings)


@pytest.mark.parametrize("prefix, settings, routers, left", [
    ("Dbrx", dict(d_model=64, n_heads=4, n_layers=1, vocab_size=256, max_seq_len=64, attn_config={"kv_n_heads": 2, "rope_theta": 1e4},
                  ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64}),
     ["ffn.router.layer"], ["ffn.experts.mlp"]),
    ("JetMoe", dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_key_value_heads=2, kv_channels=16, vocab_size=256,
                    num_local_experts=4, num_experts_per_tok=2), ["mlp.router.layer", "self_attention.experts.router.layer"],
     ["self_attention.experts.input_linear", "self_attention.experts.output_linear", "mlp.input_linear", "mlp.output_linear"]),
    ("Mamba", dict(hidden_size=64, num_hidden_layers=1, vocab_size=256, state_size=16), [], []),
    ("Cohere", dict(hidden_size=1024, num_attention_heads=32, intermediate_size=32, num_hidden_layers=1, vocab_size=256, use_qk_norm=True,
                    bos_token_id=None, eos_token_id=None, pad_token_id=None), [], []),
])
def test_every_weight_is_a_linear_a_router_or_left_with_a_warning(prefix, settings, routers, left):
    """Experts in stacked 2-D or 3-D matrices warn; depthwise kernels, states and norms of several heads do not."""
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{prefix}Config")(**settings))
    name = largest_list(model) + ".0"
    block = model.get_submodule(name)
    warnings = unfuse_experts(model, [Block(name, block)])[1]
    assert sorted(w.partition(": ")[0] for w in warnings) == sorted(f"{name}.{module}" for module in left)
    missed = {m for m, module in block.named_modules() if isinstance(module, nn.Linear)} - {m for m in linears(block, "")}
    assert missed == set(routers)


def test_idle_experts_are_quantized_and_reported(ids):
    model = build("mixtral")
    for block in model.model.layers:
        block.mlp.gate.weight.data[3] = 0
        block.mlp.gate.weight.data[:3] = block.mlp.gate.weight.data[:3].abs()
    model.model.embed_tokens.weight.data.abs_()
    for norm in (m for m in model.modules() if "RMSNorm" in type(m).__name__):
        norm.weight.data.fill_(1.0)
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
    report = gptvq.quantize(model, None, preset(), calibration=ids)
    idle = [r for r in report.layers if r.tokens == 0]
    assert {r.name for r in idle} >= {f"model.layers.0.mlp.experts.3.{m}" for m in ("gate_proj", "up_proj", "down_proj")}
    assert all(r.repair == "0 tokens: 100% from other experts" and r.error < 0.3 for r in idle)
    assert len(report.warnings) == len(idle) and all("saw no calibration tokens" in w for w in report.warnings)


def test_routers_heads_and_embeddings_are_not_quantized(ids):
    for name in ("mixtral", "qwen2-moe"):
        names = {r.name for r in gptvq.quantize(build(name), None, preset(), calibration=ids).layers}
        assert not any(n.endswith((".gate", "shared_expert_gate")) or not n.startswith("model.layers.") for n in names)


class Plain(nn.Module):
    """No Hugging Face model: blocks in a list, ids in, logits out; one linear is never called through its forward."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.by_hand = nn.Linear(32, 48), nn.Linear(48, 32), nn.Linear(32, 32)

        def forward(self, x):
            return x + self.down(torch.relu(self.up(x))) + x @ self.by_hand.weight.T

    def __init__(self):
        super().__init__()
        self.embed, self.blocks, self.head = nn.Embedding(256, 32), nn.ModuleList(self.Block() for _ in range(3)), nn.Linear(32, 256)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_a_plain_module_works_in_memory(ids):
    model = Plain()
    report = gptvq.quantize(model, None, VQConfig(recipe=preset().recipe), calibration=ids)
    assert report.model is model and [r.name for r in report.layers] == [f"blocks.{i}.{n}" for i in range(3) for n in ("up", "down")]
    assert [w.partition(":")[0] for w in report.warnings] == [f"blocks.{i}.by_hand" for i in range(3)]
    assert isinstance(model.blocks[0].by_hand, nn.Linear) and report.dense_bytes == 4 * 3 * 2 * 32 * 48
    assert model(ids).isfinite().all()
