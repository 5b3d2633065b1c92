"""Every architecture: quantized, saved, read back from disk, and the same model in both places."""
import json

import pytest
import torch
from job.tiny_models import ARCHITECTURES, build, logits, preset
from safetensors import safe_open

import gptvq
from gptvq.linear import VQLinear


def stored(folder):
    """{tensor: (bytes, dtype)} of all files."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                assert name not in found
                tensor = tensors.get_tensor(name)
                found[name] = (tensor.numel() * tensor.element_size(), tensor.dtype)
    return found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_was_saved_is_what_runs(name, tmp_path, ids):
    linears = ARCHITECTURES[name][2]
    dense = logits(build(name), ids[:2])
    report = gptvq.quantize(build(name), tmp_path / "out", preset("2d-4.125"), calibration=ids)
    model = report.model
    assert len(report.layers) == linears and not report.warnings
    in_memory = logits(model, ids[:2])
    assert 0 < float((in_memory - dense).norm() / dense.norm()) < 0.4

    loaded = gptvq.load(tmp_path / "out", device="cpu")
    assert not loaded.training
    before, after = dict(model.named_modules()), dict(loaded.named_modules())
    for record in report.layers:
        assert isinstance(after[record.name], VQLinear) and after[record.name].name == record.name
        assert after[record.name].spec == record.spec
        assert torch.equal(after[record.name].dequantize(), before[record.name].dequantize())
    assert torch.equal(logits(loaded, ids[:2]), in_memory)

    files = stored(tmp_path / "out")
    layers = {r.name for r in report.layers}
    packed = sum(nbytes for tensor, (nbytes, _) in files.items() if tensor.rpartition(".")[0] in layers and not tensor.endswith(".bias"))
    weights = sum(r.rows * r.cols for r in report.layers)
    assert 8 * packed / weights == pytest.approx(report.bits_per_value, rel=1e-3)
    assert sum(nbytes for nbytes, _ in files.values()) == report.packed_bytes + report.other_bytes
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["bits_per_value"] == report.bits_per_value and settings["calibration"]["sha256"] == report.calibration["sha256"]
    assert set(settings["layers"]) == layers


def test_tied_head_is_stored_once(tmp_path, ids):
    gptvq.quantize(build("llama-tied"), tmp_path / "tied", preset(), calibration=ids)
    gptvq.quantize(build("llama"), tmp_path / "untied", preset(), calibration=ids)
    assert "lm_head.weight" not in stored(tmp_path / "tied")
    assert "lm_head.weight" in stored(tmp_path / "untied")
    loaded = gptvq.load(tmp_path / "tied", device="cpu")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_untouched_tensors_keep_their_dtype(tmp_path, ids, dtype):
    report = gptvq.quantize(build("qwen2", dtype), tmp_path / "out", preset(), calibration=ids)
    files = stored(tmp_path / "out")
    packed = {f"{r.name}.{buffer}" for r in report.layers for buffer in r.spec.buffer_shapes()}
    assert {kind for tensor, (_, kind) in files.items() if tensor not in packed} == {dtype}
    loaded = gptvq.load(tmp_path / "out", device="cpu")
    assert loaded.dtype == dtype and torch.equal(logits(loaded, ids), logits(report.model, ids))
    wider = gptvq.load(tmp_path / "out", device="cpu", dtype="float32")
    layer = wider.get_submodule(report.layers[0].name)
    assert wider.dtype == torch.float32 and layer.bias.dtype == torch.float32
    assert layer.gs.dtype == torch.bfloat16                     # part of the format, whatever dtype the model takes
    assert torch.equal(layer.dequantize(), loaded.get_submodule(report.layers[0].name).dequantize())


@pytest.mark.parametrize("label", ["1d-3.125", "4d-2.25", "2d-2.25-s64"])
def test_every_kind_of_buffer_survives_the_disk(tmp_path, ids, label):
    report = gptvq.quantize(build(), tmp_path / "out", preset(label), calibration=ids)
    assert torch.equal(logits(gptvq.load(tmp_path / "out", device="cpu"), ids), logits(report.model, ids))


def test_svd_codebooks_survive_the_disk(tmp_path, ids):
    report = gptvq.quantize(build(), tmp_path / "out", preset("1d-3.125", svd_rank=4), calibration=ids)
    assert report.layers[0].spec.svd_rank == 4
    assert torch.equal(logits(gptvq.load(tmp_path / "out", device="cpu"), ids), logits(report.model, ids))


def test_rules_leave_layers_dense_and_change_formats(tmp_path, ids):
    rules = (("*.down_proj", None), ("*.layers.0.*", "2d-4.125"))
    source = build()
    down = source.model.layers[0].mlp.down_proj.weight.clone()
    report = gptvq.quantize(source, tmp_path / "out", preset(rules=rules), calibration=ids)
    assert len(report.layers) == 12
    assert {r.spec.index_bits for r in report.layers if ".layers.0." in r.name} == {4}
    loaded = gptvq.load(tmp_path / "out", device="cpu")
    assert torch.equal(loaded.model.layers[0].mlp.down_proj.weight, down)
    assert torch.equal(logits(loaded, ids), logits(report.model, ids))


def test_dense_experts_survive_the_disk(tmp_path, ids):
    """Left dense by a rule they are stored as linears, under names that transformers would fuse again."""
    for name in ("mixtral", "qwen2-moe"):
        report = gptvq.quantize(build(name), tmp_path / name, preset(rules=(("*.experts.*", None),)), calibration=ids)
        assert torch.equal(logits(gptvq.load(tmp_path / name, device="cpu"), ids), logits(report.model, ids))


def test_transformers_loads_and_saves_it(tmp_path, ids):
    from transformers import AutoModel, AutoModelForCausalLM

    for name in ("llama-tied", "mixtral"):
        report = gptvq.quantize(build(name), tmp_path / name, preset(), calibration=ids)
        want = logits(report.model, ids)
        model, info = AutoModelForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert torch.equal(logits(model, ids), want)
        for again in (model, report.model):
            again.save_pretrained(tmp_path / "again")
            assert torch.equal(logits(gptvq.load(tmp_path / "again", device="cpu"), ids), want)
        body = AutoModel.from_pretrained(tmp_path / name)
        with torch.no_grad():
            assert torch.equal(body(ids).last_hidden_state, model.model(ids).last_hidden_state)
    assert report.model.generate(ids[:1, :4], max_new_tokens=4, do_sample=False).shape == (1, 8)


def test_same_inputs_same_bytes(tmp_path, ids):
    state = torch.get_rng_state()
    for name in "ab":
        gptvq.quantize(build(), tmp_path / name, preset(), calibration=ids)
        torch.set_rng_state(state)
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert a == b


def test_the_callers_random_numbers_are_left_alone(ids):
    model = build()
    state = torch.get_rng_state()
    gptvq.quantize(model, None, preset(), calibration=ids)
    assert torch.equal(torch.get_rng_state(), state)
