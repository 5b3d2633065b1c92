"""LoRA on packed linears: what peft's users do, on tiny models."""
import pytest
import torch

import gptvq

peft = pytest.importorskip("peft", reason="peft is not installed")

from job.tiny_models import build, logits, preset  # noqa: E402

from gptvq.peft import packed_linears  # noqa: E402

IDS = torch.arange(48).view(2, 24) * 5 % 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "model"
    gptvq.quantize(build("llama"), out, preset("2d-2.25"), calibration=IDS)
    return out


def with_adapter(folder, **settings):
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], **settings))


def test_a_packed_head_takes_no_adapter_unasked(tmp_path):
    gptvq.quantize(build("llama-tied"), tmp_path / "out", preset("2d-2.25", head="2d-4.125"), calibration=IDS)
    names, model = packed_linears(gptvq.load(tmp_path / "out")), gptvq.load(tmp_path / "out")
    assert "q_proj" in names and "lm_head" not in names
    plain = logits(model, IDS)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=[*names, "lm_head"]))
    assert torch.equal(logits(adapted, IDS), plain)


def test_a_packed_embedding_takes_none(tmp_path):
    gptvq.quantize(build("llama"), tmp_path / "out", preset("2d-2.25", head="2d-4.125"), calibration=IDS)
    with pytest.raises(gptvq.ConfigError, match="embed_tokens is a packed embedding"):
        peft.get_peft_model(gptvq.load(tmp_path / "out"), peft.LoraConfig(r=4, target_modules=["embed_tokens"]))


def test_a_new_adapter_changes_nothing_and_training_it_helps(folder):
    plain = logits(gptvq.load(folder), IDS)
    model = with_adapter(folder)
    assert torch.equal(logits(model, IDS), plain)
    packed = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith((".idx", ".cb", ".gs"))}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * 3 * 2 and packed
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for _ in range(12):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(buffer, packed[name]) for name, buffer in model.named_buffers() if name in packed)
    with model.disable_adapter():
        assert torch.equal(logits(model, IDS), plain)


def test_gradients_are_those_of_the_dense_weights(folder):
    model = with_adapter(folder, init_lora_weights=False)
    twin = with_adapter(folder, init_lora_weights=False)
    twin.load_state_dict(model.state_dict())
    for module in twin.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, gptvq.VQLinear):
                setattr(module, name, child.to_dense())
    for each in (model, twin):
        each(IDS, labels=IDS).loss.backward()
    grads = {name: p.grad for name, p in twin.named_parameters() if p.requires_grad and "lora" in name}
    mine = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(mine) == 12 and mine.keys() == grads.keys()
    for name, grad in mine.items():
        assert (grad - grads[name]).norm() <= 1e-3 * grads[name].norm(), name


def test_saved_beside_the_base_and_loaded_onto_it(folder, tmp_path):
    import transformers

    model = with_adapter(folder, init_lora_weights=False)
    model.save_pretrained(tmp_path)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(base, tmp_path), IDS), logits(model, IDS))
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) < 200_000


def test_adapters_are_joined_beside_the_base(folder):
    model = with_adapter(folder, init_lora_weights=False)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False))
    each = []
    for name in ("default", "other"):
        model.set_adapter(name)
        each.append(model.base_model.model.model.layers[0].self_attn.q_proj(torch.ones(1, 64)))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    for name, how in (("cat", {"combination_type": "cat"}), ("svd", {"svd_rank": 6})):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], name, **how)
        model.set_adapter(name)
        torch.testing.assert_close(layer(torch.ones(1, 64)), sum(each) - layer.base_layer(torch.ones(1, 64)))
    model.to(torch.bfloat16)
    assert layer.get_delta_weight("other").dtype == torch.bfloat16


def test_merging_is_refused_before_anything_is_merged(folder):
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    config = peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    want = logits(model, IDS)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(gptvq.ConfigError, match="export --dense"):
            merge()
    assert torch.equal(logits(model, IDS), want) and isinstance(base.model.embed_tokens, peft.tuners.lora.Embedding)


def test_what_packed_weights_cannot_do_is_said(folder, tmp_path):
    with pytest.raises(gptvq.ConfigError, match="export --dense"):
        with_adapter(folder).merge_and_unload()
    with pytest.raises(gptvq.ConfigError, match="use_dora"):
        with_adapter(folder, use_dora=True)
    with pytest.raises(gptvq.ConfigError, match="init_lora_weights"):
        with_adapter(folder, init_lora_weights="olora")
    with_adapter(folder).save_pretrained(tmp_path)
    import transformers

    other = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=256))
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(other, tmp_path)


def test_the_page_about_learning_runs(my_model, tmp_path, monkeypatch):
    import re
    import shutil
    from pathlib import Path

    page = (Path(__file__).parents[2] / "docs/learning.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, flags=re.M | re.S)
    text = my_model.parent / "calibration.txt"
    shutil.copy(text, tmp_path)
    gptvq.quantize(str(my_model), tmp_path / "my-model-2.25", preset("2d-2.25"), calibration=str(text), samples=2, sequence_length=32)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code.replace(":256", ":64"), "docs/learning.md", "exec"), names)
    assert isinstance(names["model"], peft.PeftModel) and (tmp_path / "my-adapter" / "adapter_model.safetensors").exists()
