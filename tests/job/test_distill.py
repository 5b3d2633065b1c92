"""Codebooks, scales and norms of a block that learn together: nearer to the dense block, indices and size as before, and a job like any other."""
import copy
import gc

import pytest
import torch
import transformers
from job.tiny_models import QUICK, build, logits
from safetensors.torch import load_file, save_file

import gptvq
from gptvq.config import Recipe, VQConfig
from gptvq.distill import distill
from gptvq.errors import ConfigError, FormatError, NumericalError
from gptvq.learning import Learning, LearningLinear
from gptvq.linear import VQLinear
from gptvq.model import find_blocks, linears, record_calls, unfuse_experts
from gptvq.plan import plan
from gptvq.solver import quantize_weight

CPU = torch.device("cpu")


def config(label="2d-2.25", distill=2, **changes):
    return VQConfig.preset(label, recipe=Recipe(**{**QUICK.__dict__, "distill": distill}), **changes)


def opened(name, ids, dtype=torch.float32, label="2d-2.25"):
    """(a block with roughly packed linears, those, what enters it, what leaves it when dense)"""
    model = build(name, dtype)
    block = find_blocks(model, ids[:1])[0]
    unfuse_experts(model, [block])
    record_calls(model, [block], ids[:1], CPU)
    width = model.get_input_embeddings().weight.shape[1]
    hidden = [torch.randn(1, ids.shape[1], width).to(dtype) for _ in ids]
    with torch.no_grad():
        wanted = [block(state) for state in hidden]
    packed = {}
    for full, linear in linears(block.module, block.name).items():
        weight = (linear.weight.T if name == "gpt2" else linear.weight).detach().float()
        vq = quantize_weight(weight, torch.eye(weight.shape[1]), VQConfig.preset(label, recipe=QUICK))
        packed[full] = VQLinear.from_weight(vq, linear.bias, full)
    return block, packed, hidden, wanted


def error(block, hidden, wanted):
    with torch.no_grad():
        return float(torch.stack([((block(x) - y).double().square().sum(-1) / y.double().square().sum(-1)).mean()
                                  for x, y in zip(hidden, wanted)]).mean())


def small(block):
    return {n: (p.detach().clone(), p.requires_grad) for n, p in block.module.named_parameters() if p.ndim == 1}


@pytest.mark.parametrize("name, dtype, label", [("llama", torch.float32, "2d-2.25"), ("gpt2", torch.float32, "2d-2.25-s32"),
                                                ("mixtral", torch.float32, "2d-2.25"), ("llama", torch.bfloat16, "2d-2.25-s16")])
def test_the_block_gets_nearer_to_the_dense_one(name, dtype, label, ids, monkeypatch):
    monkeypatch.setattr("gptvq.distill.RATE", 5e-3)           # few steps
    block, packed, hidden, wanted = opened(name, ids, dtype, label)
    before = small(block)
    with torch.no_grad():
        learnt, (first, last) = distill(block, packed, hidden, wanted, 3, CPU)
    assert last < 0.97 * first and list(learnt) == list(packed)
    assert last == pytest.approx(error(block, hidden, wanted), rel=1e-3 if dtype == torch.float32 else 0.05)
    for full, linear in learnt.items():
        assert linear.spec == packed[full].spec and torch.equal(linear.idx, packed[full].idx)
        dense = block.module.get_submodule(full.removeprefix(block.name + "."))
        assert type(dense) is torch.nn.Linear and torch.equal(dense.weight, linear.dequantize(dtype))
        assert not linear.spec.scale_block or not torch.equal(linear.sz, packed[full].sz)
    assert small(block).keys() == before.keys() and all(p.grad is None for p in block.module.parameters())
    for n, p in block.module.named_parameters():
        if n in before:
            assert not torch.equal(p, before[n][0]) and p.requires_grad == before[n][1]
            p.data.copy_(before[n][0])
    for full, linear in packed.items():                     # what it reports as "before" is the block as it was
        block.module.set_submodule(full.removeprefix(block.name + "."), linear.to_dense(dtype))
    assert first == pytest.approx(error(block, hidden, wanted), rel=1e-3 if dtype == torch.float32 else 0.05)


def test_what_does_not_help_is_not_kept(ids):
    """The target is what the packed block gives already: any step leads away from it."""
    block, packed, hidden, _ = opened("llama-bias", ids)
    for full, linear in packed.items():
        block.module.set_submodule(full.removeprefix(block.name + "."), linear.to_dense())
    with torch.no_grad():
        wanted, before = [block(state) for state in hidden], small(block)
        learnt, errors = distill(block, packed, hidden, wanted, 1, CPU)
    assert learnt == packed and errors[0] == errors[1] and error(block, hidden, wanted) == pytest.approx(errors[0], abs=1e-12)
    assert all(torch.equal(value, before[n][0]) and wanted == before[n][1] for n, (value, wanted) in small(block).items())


def test_a_whole_job(tmp_path, ids):
    """Nearer to the dense model than without, of a folder as of a module, the same bytes again, and hashes that are right."""
    dense = build()
    dense.save_pretrained(tmp_path / "model")
    wanted = logits(dense, ids)
    plain = gptvq.quantize(copy.deepcopy(dense), None, config(distill=0), calibration=ids, device="cpu")
    report = gptvq.quantize(tmp_path / "model", tmp_path / "out", config(), calibration=ids, device="cpu", check=None)
    again = gptvq.quantize(copy.deepcopy(dense), None, config(), calibration=ids, device="cpu")
    assert [r.sha256 for r in report.layers] == [r.sha256 for r in again.layers]
    assert sum(a.sha256 != b.sha256 for a, b in zip(plain.layers, report.layers)) > len(plain.layers) / 2
    assert report.bits_per_value == plain.bits_per_value and not report.warnings and report.stages["distill"] > 0
    for record in gptvq.Report.load(tmp_path / "out").layers:
        assert 0 < record.distilled[1] <= record.distilled[0]
    assert {tuple(r.distilled) for r in plain.layers} == {()} and len({tuple(r.distilled) for r in report.layers}) == 2
    assert gptvq.verify(tmp_path / "out").layers == len(report.layers)
    assert torch.equal(logits(gptvq.load(tmp_path / "out"), ids), logits(again.model, ids))
    norms = [model.get_parameter("model.layers.0.post_attention_layernorm.weight") for model in (dense, again.model)]
    assert not torch.equal(*norms)
    off = [float((logits(model, ids) - wanted).square().mean()) for model in (again.model, plain.model)]
    assert off[0] < off[1]
    assert not any(isinstance(module, LearningLinear) for module in again.model.modules())


def stop_at(monkeypatch, step, error):
    """Has the given learning step, counted over all blocks, end in an error instead."""
    real, count = Learning.step, []

    def counting(self, *args):
        count.append(0)
        if len(count) == step:
            raise error
        return real(self, *args)

    monkeypatch.setattr(Learning, "step", counting)


@pytest.mark.parametrize("kind", ["folder", "module"])
def test_ctrl_c_loses_nothing(kind, tmp_path, ids, monkeypatch):
    """Stopped while the second block learns, the same call goes on behind the first and gives the same bytes."""
    build("llama-bias").save_pretrained(tmp_path / "model")
    model = (lambda: tmp_path / "model") if kind == "folder" else lambda: build("llama-bias")
    whole = gptvq.quantize(model(), tmp_path / "whole", config(), calibration=ids, device="cpu", check=None)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_at(patched, 2 * len(ids) + 3, KeyboardInterrupt)
        gptvq.quantize(model(), tmp_path / "out", config(), calibration=ids, device="cpu", check=None)
    report = gptvq.quantize(model(), tmp_path / "out", config(), calibration=ids, device="cpu", check=None)
    assert [(r.sha256, r.distilled) for r in report.layers] == [(r.sha256, r.distilled) for r in whole.layers]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert torch.equal(logits(report.model, ids), logits(whole.model, ids))


@pytest.mark.parametrize("kind", ["folder", "module"])
def test_done_again_from_the_second_block_on(kind, tmp_path, ids):
    """The first keeps what its norms and biases have learnt, and the second is solved for what it gives with them."""
    build("llama-bias").save_pretrained(tmp_path / "model")
    model = (lambda: tmp_path / "model") if kind == "folder" else lambda: build("llama-bias")
    gptvq.quantize(model(), tmp_path / "out", config(), calibration=ids, device="cpu", check=None)
    before = load_file(tmp_path / "out" / "model.safetensors")
    again = lambda: gptvq.quantize(model(), tmp_path / "out", config(), calibration=ids, device="cpu", check=None, redo="layers.1.*")
    again()
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    gptvq.quantize(model(), tmp_path / "out", config(), calibration=ids, device="cpu", check=None, resume="fresh", overwrite=True)
    norm = "model.layers.0.input_layernorm.weight"
    save_file({**before, norm: before[norm] * 2}, tmp_path / "out" / "model.safetensors")
    with pytest.raises(FormatError, match="model.safetensors: not what was written"):
        again()


def test_a_block_that_diverges_stays_as_it_was(ids, monkeypatch):
    stop_at(monkeypatch, 3, NumericalError("not finite"))
    report = gptvq.quantize(build("llama-bias"), None, config(), calibration=ids, device="cpu")
    errors = {record.name.split(".")[2]: record.distilled for record in report.layers}
    assert errors["0"][0] == errors["0"][1] and errors["1"][0] > errors["1"][1]
    plain = gptvq.quantize(build("llama-bias"), None, config(distill=0), calibration=ids, device="cpu")
    same = [a.sha256 == b.sha256 for a, b in zip(report.layers, plain.layers)]
    assert all(same[:7]) and not all(same[7:])
    wanted = {n: p.requires_grad for n, p in plain.model.named_parameters()}
    assert any("bias" in n for n in wanted) and {n: p.requires_grad for n, p in report.model.named_parameters()} == wanted


@pytest.mark.gpu
@pytest.mark.parametrize("label", ["2d-2.25", "2d-2.25-s32"])
def test_on_a_gpu(label, ids):
    """As much as on the CPU, whose codes may be others here and there."""
    on = {device: gptvq.quantize(build("llama-bias"), None, config(label), calibration=ids, device=device) for device in ("cpu", "cuda")}
    for cpu, gpu in zip(*(report.layers for report in on.values())):
        assert 0 < gpu.distilled[1] < gpu.distilled[0] and gpu.distilled == pytest.approx(cpu.distilled, rel=0.2)
    torch.testing.assert_close(logits(on["cuda"].model.cpu(), ids), logits(on["cpu"].model, ids), rtol=0.2, atol=0.5)


def test_tokens_without_finite_values_do_not_count(ids):
    block, packed, hidden, wanted = opened("llama", ids)
    wanted[1][0, 5] = float("inf")
    with torch.no_grad():
        learnt, (first, last) = distill(block, packed, hidden, wanted, 1, CPU)
    assert 0 < last < first and all(bool(torch.isfinite(linear.dequantize()).all()) for linear in learnt.values())


def test_codebooks_of_zeros_stay(ids):
    """Rows of zeros make codebooks without a scale; all others of the block learn as ever."""
    block, packed, hidden, wanted = opened("llama", ids)
    name = next(full for full in packed if full.endswith("gate_proj"))
    weight = packed[name].dequantize()
    weight[: packed[name].spec.group_rows] = 0
    packed[name] = VQLinear.from_weight(quantize_weight(weight, torch.eye(weight.shape[1]), packed[name].spec), None, name)
    with torch.no_grad():
        learnt, (first, last) = distill(block, packed, hidden, wanted, 2, CPU)
    assert last < first and not bool(learnt[name].dequantize()[: packed[name].spec.group_rows].any())


def test_nothing_is_left_in_memory(ids):
    """No cycle keeps what has learnt until the next collection of garbage."""
    gc.collect()
    gc.disable()
    try:
        gptvq.quantize(build(), None, config(distill=1), calibration=ids, device="cpu", check=None)
        assert not [o for o in gc.get_objects() if isinstance(o, (Learning, LearningLinear))]
    finally:
        gc.enable()


def test_a_residual_stream_of_another_dtype(ids):
    """Mamba's is float32 beside bfloat16 linears."""
    torch.manual_seed(0)
    settings = transformers.MambaConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2, state_size=8, residual_in_fp32=True)
    model = transformers.AutoModelForCausalLM.from_config(settings).to(torch.bfloat16).eval()
    report = gptvq.quantize(model, None, config(distill=1), calibration=ids[:2], device="cpu")
    assert report.layers and all(len(record.distilled) == 2 for record in report.layers)


def test_bad_settings(ids, monkeypatch):
    with pytest.raises(ConfigError, match="distill=1 needs compensate"):
        Recipe(distill=1, compensate=0)
    with pytest.raises(ConfigError, match="distill must be an integer >= 0"):
        Recipe(distill=-1)
    with pytest.raises(ConfigError, match="k_proj has SVD codebooks.*svd_rank"):
        gptvq.quantize(build(), None, config(rules=(("*k_proj", {"dim": 1, "index_bits": 3, "group_size": 512, "svd_rank": 2}),)),
                       calibration=ids, device="cpu")
    monkeypatch.setattr("gptvq.ranks.size", lambda: 2)
    with pytest.raises(ConfigError, match="got 2 processes"):
        gptvq.quantize(build(), None, config(), calibration=ids, device="cpu")


def test_a_plan_says_what_it_does_not_count(ids):
    assert any("learning the codebooks" in text for text in plan(build(), config(), calibration=ids, device="cpu").warnings)
    assert not plan(build(), config(distill=0), calibration=ids, device="cpu").warnings
