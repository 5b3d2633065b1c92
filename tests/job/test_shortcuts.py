"""What runs of a block leave out: the result is the same to the byte, attention is computed twice instead of five times."""
import copy
import gc
import sys
import types

import pytest
import torch
import transformers
from job.tiny_models import ARCHITECTURES, QUICK, build, logits

import gptvq
from gptvq.config import Recipe, VQConfig
from gptvq.drift import Stage, find_stages
from gptvq.model import find_blocks, linears, record_calls, unfuse_experts
from gptvq.shortcuts import Shortcuts

CPU = torch.device("cpu")


def config(**changes):
    return VQConfig.preset("2d-2.25", recipe=Recipe(**{**QUICK.__dict__, **changes}))


def without(monkeypatch):
    monkeypatch.setattr(Shortcuts, "find", classmethod(lambda cls, block, *_: cls(block)))


def opened(name, ids):
    """(a dense block, its linears, what may enter it)"""
    model = build(name)
    block = find_blocks(model, ids[:1])[0]
    unfuse_experts(model, [block])
    record_calls(model, [block], ids[:1], CPU)
    return block, linears(block.module, block.name), torch.randn(1, ids.shape[1], 64, generator=torch.Generator().manual_seed(1))


def found(name, ids, stages=None):
    block, found, hidden = opened(name, ids)
    return Shortcuts.find(block, find_stages(block, found, hidden) if stages is None else stages, found, [hidden], CPU)


@pytest.mark.parametrize("name, changes", [*((name, {}) for name in ARCHITECTURES), ("llama", {"distill": 1})])
def test_the_same_bytes(name, changes, ids, monkeypatch):
    dense = build(name)
    short = gptvq.quantize(copy.deepcopy(dense), None, config(**changes), calibration=ids, device="cpu")
    without(monkeypatch)
    long = gptvq.quantize(dense, None, config(**changes), calibration=ids, device="cpu")
    assert [(r.name, r.sha256, r.error) for r in short.layers] == [(r.name, r.sha256, r.error) for r in long.layers]
    assert torch.equal(logits(short.model, ids), logits(long.model, ids))


def mamba():
    """The input of its last linear is not contiguous."""
    torch.manual_seed(0)
    settings = transformers.MambaConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2, state_size=8, use_bias=True)
    return transformers.AutoModelForCausalLM.from_config(settings).to(torch.bfloat16).eval()


@pytest.mark.parametrize("make", [lambda: build("llama-bias", torch.bfloat16), mamba])
def test_the_same_bytes_from_files(make, ids, tmp_path, monkeypatch):
    short = gptvq.quantize(make(), None, config(), calibration=ids, device="cpu")
    monkeypatch.setattr("gptvq.stream.available_memory", lambda: 1)
    filed = gptvq.quantize(make(), tmp_path / "out", config(), calibration=ids, device="cpu", check=None)
    without(monkeypatch)
    long = gptvq.quantize(make(), None, config(), calibration=ids, device="cpu")
    assert [r.sha256 for r in short.layers] == [r.sha256 for r in filed.layers] == [r.sha256 for r in long.layers]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bytes_on_a_gpu(dtype, ids, monkeypatch):
    short = gptvq.quantize(build("llama", dtype), None, config(), calibration=ids, device="cuda")
    without(monkeypatch)
    long = gptvq.quantize(build("llama", dtype), None, config(), calibration=ids, device="cuda")
    assert [(r.name, r.sha256) for r in short.layers] == [(r.name, r.sha256) for r in long.layers]


def calls(monkeypatch, owner, run):
    count, real = [], owner.forward
    with monkeypatch.context() as patch:
        patch.setattr(owner, "forward", lambda self, *args, **kwargs: (count.append(0), real(self, *args, **kwargs))[1])
        run()
    return len(count)


def test_attention_is_computed_twice(ids, monkeypatch):
    """In the dense stream and for its output projection; else also for gate and up, for down, and for the block's output."""
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

    def run(**changes):
        return calls(monkeypatch, owner, lambda: gptvq.quantize(build(), None, config(**changes), calibration=ids, device="cpu"))

    owner = LlamaAttention
    # For each sample also for q, k and v, whose run ends there.  Beside the samples: two calls of the survey, one to find the stages, one to
    # find the shortcuts.
    assert run() == 2 * (3 * len(ids) + 4) and run(distill=1) == 2 * (7 * len(ids) + 4)
    owner = LlamaMLP
    assert run() == 2 * (3 * len(ids) + 4)                  # its down_proj's input is kept, too, and spares the block's output
    without(monkeypatch)
    assert run() == 2 * (4 * len(ids) + 3)
    owner = LlamaAttention
    assert run() == 2 * (6 * len(ids) + 3)


@pytest.mark.parametrize("name, ends", [("llama", ["o_proj", "down_proj"]), ("gpt2", ["c_proj"]), ("mixtral", ["o_proj"]),
                                        ("gemma2", ["down_proj"])])           # its attention returns weights, too
def test_where_there_are_any(name, ends, ids):
    assert [part.linear for part in found(name, ids)._parts.values()] == ends


def test_where_there_are_none(ids):
    block, own, hidden = opened("llama", ids)
    names = list(own)
    q, k, v, o = (Stage((name,), aligned=True, summed=name.endswith("o_proj")) for name in names[:4])
    assert list(found("llama", ids, [q, k, v, o])._parts) == list(o.names)
    assert not found("llama", ids, [q, k, o, v])._parts                                       # v may still change
    assert not found("llama", ids, [q, k, v, Stage(o.names)])._parts                          # not one call with a row per token

    attention = block.module.self_attn
    for change in (lambda out: (out[0] * 1, None), lambda out: (out[0], out[0]), lambda out: (out[0].mul_(1), None)):
        handle = attention.register_forward_hook(lambda m, args, out, change=change: change(out))
        assert [p.linear for p in Shortcuts.find(block, find_stages(block, own, hidden), own, [hidden], CPU)._parts.values()] == ["down_proj"]
        handle.remove()
    # It would miss what attention puts into it.
    name = "cache" if "cache" in block.kwargs else "past_key_values"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(block.kwargs, name, transformers.DynamicCache())
        assert not Shortcuts.find(block, [q, k, v, o], own, [hidden], CPU)._parts
    hooks = (attention, lambda m, args, kwargs: (args, {**kwargs, "shared": {}})), \
            (attention.o_proj, lambda m, args, kwargs: ((args[0].transpose(1, 2).contiguous().transpose(1, 2),), kwargs))
    for module, hook in hooks:                              # a dictionary that others may look into; an input that is not contiguous
        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
        assert not Shortcuts.find(block, [q, k, v, o], own, [hidden], CPU)._parts
        handle.remove()
    real = attention.forward
    attention.forward = lambda hidden_states, **kwargs: real(hidden_states=hidden_states.mul_(1), **kwargs)
    assert not Shortcuts.find(block, [q, k, v, o], own, [hidden], CPU)._parts                 # it changes what others may read
    del attention.forward
    assert Shortcuts.find(block, [q, k, v, o], own, [hidden], CPU)._parts


@pytest.mark.parametrize("times, here, elsewhere", [(1, 2, 2), (3, 2, 1), (4, 1, 1)])
def test_what_is_kept_takes_no_more_room_than_there_is(times, here, elsewhere, ids):
    """Hidden states beside the block's device are slow to reach: less is worth keeping there."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=64 * times, num_hidden_layers=1,
                                                                   num_attention_heads=4, num_key_value_heads=2))
    block = find_blocks(model, ids[:1])[0]
    record_calls(model, [block], ids[:1], CPU)
    own, hidden = linears(block.module, block.name), torch.randn(1, ids.shape[1], 64)
    stages = find_stages(block, own, hidden)
    away = types.SimpleNamespace(device=torch.device("meta"), to=lambda device: hidden)
    for state, ends in ((hidden, here), (away, elsewhere)):
        kept = [part.linear for part in Shortcuts.find(block, stages, own, [state], CPU)._parts.values()]
        assert kept == ["o_proj", "down_proj"][:ends]


def test_linears_that_give_no_shortcut_take_no_room(ids):
    """Phi-3's q, k and v are one linear, and gate and up, each alone in its stage."""
    settings = transformers.Phi3Config(vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=1, num_attention_heads=4,
                                       num_key_value_heads=2, pad_token_id=0)
    model = transformers.Phi3ForCausalLM(settings)
    block = find_blocks(model, ids[:1])[0]
    record_calls(model, [block], ids[:1], CPU)
    own, hidden = linears(block.module, block.name), torch.randn(1, ids.shape[1], 64)
    kept = Shortcuts.find(block, find_stages(block, own, hidden), own, [hidden], CPU)._parts.values()
    assert [part.linear for part in kept] == ["o_proj", "down_proj"]


def test_lists_of_hidden_states(ids, monkeypatch):
    """As many as `gptvq plan` and the choice of where they live count on."""
    from gptvq import quantize as entry
    from gptvq import stream

    module = sys.modules["gptvq.quantize"]
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=192, num_hidden_layers=3,
                                                                   num_attention_heads=4, num_key_value_heads=2))
    most = []

    def lists():
        """Hidden states' storages that live, in lists of all samples."""
        gc.collect()
        found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects()
                 if type(t) is torch.Tensor and t.ndim == 3 and t.shape[:2] == (1, ids.shape[1]) and t.shape[2] in (64, 192)}
        most.append(sum(found.values()) / (4 * 64 * ids.numel()))

    for name in ("run_dense", "collect", "_require_finite"):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, real=real, **kwargs: (real(*args, **kwargs), lists())[0])
    entry(model, None, config(), calibration=ids, device="cpu", check=None)
    assert 6 < max(most) < stream._STREAMS + 0.5


def test_what_a_run_replaces(ids):
    """Whatever is in the linear's place by now, from what it read; afterwards, also after an error, the module is as it was."""
    block, own, hidden = opened("llama", ids)
    stages = find_stages(block, own, hidden)
    shortcuts = Shortcuts.find(block, stages, own, [hidden], CPU)
    with torch.no_grad():
        wanted = block(hidden)
        inputs = []
        handle = block.module.self_attn.o_proj.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
        block(hidden)
        handle.remove()
        shortcuts.keep(next(n for n in own if n.endswith("o_proj")), inputs[0])
        block.module.self_attn.q_proj.weight.zero_()        # not looked at any more
        assert torch.equal(shortcuts(0, hidden), wanted)
        assert not torch.equal(shortcuts(1, hidden), wanted)            # a sample of which nothing is kept
        block.module.self_attn.o_proj.weight.mul_(2)
        assert not torch.equal(shortcuts(0, hidden), wanted)
        handle = block.module.mlp.register_forward_pre_hook(lambda m, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            shortcuts(0, hidden)
        handle.remove()
        assert "forward" not in block.module.self_attn.__dict__
        part = shortcuts._parts[next(n for n in own if n.endswith("o_proj"))]

        class Broken(list):
            def __getitem__(self, place):
                raise KeyboardInterrupt

        part.inputs, real = Broken(part.inputs), block.module.self_attn.forward
        block.module.self_attn.forward = real                           # as others put one in its place
        with pytest.raises(KeyboardInterrupt):
            shortcuts(0, hidden)
        assert block.module.self_attn.__dict__["forward"] is real
        shortcuts.keep(next(n for n in own if n.endswith("o_proj")), inputs[0].transpose(1, 2))
        assert not any(name.endswith("o_proj") for name in shortcuts._parts)                    # a sample that would not be the same
