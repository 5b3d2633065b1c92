"""Damaged, incomplete and foreign checkpoints: FormatError naming file and tensor."""
import json
import shutil

import pytest
import torch
from job.tiny_models import build, logits, preset
from safetensors.torch import load_file, save_file

import gptvq
from gptvq import ConfigError, FormatError, checkpoint

LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A finished checkpoint with biases, to copy."""
    folder = tmp_path_factory.mktemp("packed") / "out"
    gptvq.quantize(build("llama-bias"), folder, preset(), calibration=torch.arange(64).view(2, 32))
    return folder


@pytest.fixture
def copy(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "copy")
    return tmp_path / "copy"


def refused(folder, *parts, error=FormatError):
    with pytest.raises(error) as caught:
        gptvq.load(folder, device="cpu")
    assert all(str(part) in str(caught.value) for part in parts), caught.value


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(tensors, "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def edit_settings(folder, change):
    values = json.loads((folder / "config.json").read_text())
    change(values["quantization_config"])
    (folder / "config.json").write_text(json.dumps(values))


def test_missing_tensors(copy):
    for name in (f"{LAYER}.idx", f"{LAYER}.gs", f"{LAYER}.bias", "model.norm.weight", "lm_head.weight"):
        backup = {file: file.read_bytes() for file in copy.glob("model.safetensors*")}
        edit_tensors(copy, lambda t: t.pop(name))
        refused(copy, str(copy), repr(name), "missing")
        for file, data in backup.items():
            file.write_bytes(data)
    gptvq.load(copy, device="cpu")


def test_extra_tensors(copy):
    edit_tensors(copy, lambda t: t.update(stranger=torch.zeros(2)))
    refused(copy, copy / "model.safetensors", "'stranger'", "belongs to no layer")


@pytest.mark.parametrize("name, change", [
    (f"{LAYER}.idx", lambda t: t[1:].contiguous()), (f"{LAYER}.idx", lambda t: t.short()), (f"{LAYER}.gs", lambda t: t.float()),
    (f"{LAYER}.cb", lambda t: t[..., :8].contiguous()), (f"{LAYER}.bias", lambda t: t[:-1].contiguous()),
    ("model.embed_tokens.weight", lambda t: t[:-1].contiguous())])
def test_misshaped_tensors(copy, name, change):
    edit_tensors(copy, lambda t: t.update({name: change(t[name])}))
    refused(copy, copy / "model.safetensors", repr(name), "got", "need")


def test_damaged_files(copy):
    whole = (copy / "model.safetensors").read_bytes()
    for bytes_, says in ((whole[:-1], "data_offsets"), (whole[:100], "header"), (b"", "header"), (whole + b"x", "tensors end at byte")):
        (copy / "model.safetensors").write_bytes(bytes_)
        refused(copy, copy / "model.safetensors", says)
    (copy / "model.safetensors").unlink()
    refused(copy, copy / "model.safetensors")


def test_damaged_settings(copy):
    text = (copy / "config.json").read_text()
    (copy / "config.json").write_text(text[:-20])
    refused(copy, copy / "config.json", "not valid JSON")
    (copy / "config.json").write_text("[]")
    refused(copy, copy / "config.json", "need an object")
    for change, parts in [
            (lambda q: q.update(layout_version=2), ("layout version 2", "up to version 1", "upgrade gptvq")),
            (lambda q: q.update(layout_version="one"), ("layout_version", "'one'")),
            (lambda q: q.update(layers={}), ("layers",)),
            (lambda q: q["layers"][LAYER].update(dim=3), (LAYER, "dim=3")),
            (lambda q: q["layers"][LAYER].update(colour=1), (LAYER, "colour")),
            (lambda q: q["layers"][LAYER].update(rows=95), (f"{LAYER}.bias", "(96,)", "(95,)")),
            (lambda q: q["layers"].pop(LAYER), (LAYER,)),
            (lambda q: q["layers"].update({"model.layers.7.x": q["layers"][LAYER]}), ("model.layers.7.x.idx", "missing")),
            (lambda q: q.update(surprise=1), ("surprise",)),
            (lambda q: q.update(experts=["model.norm"]), ("model.norm",))]:
        (copy / "config.json").write_text(text)
        edit_settings(copy, change)
        refused(copy, *parts)


def test_transformers_meets_the_same_checks(copy):
    from transformers import AutoModelForCausalLM

    edit_tensors(copy, lambda t: t.pop(f"{LAYER}.idx"))
    with pytest.raises(FormatError, match="missing"):
        AutoModelForCausalLM.from_pretrained(copy)
    edit_settings(copy, lambda q: q["layers"].update({"model.layers.7.x": q["layers"][LAYER]}))
    with pytest.raises(FormatError, match="no linear"):
        AutoModelForCausalLM.from_pretrained(copy)
    edit_settings(copy, lambda q: q["layers"][LAYER].update(rows=95))
    with pytest.raises(FormatError, match="for .95, 64.*has .96, 64. there"):
        AutoModelForCausalLM.from_pretrained(copy)
    edit_settings(copy, lambda q: q.update(layout_version=2))
    with pytest.raises(FormatError, match="upgrade gptvq"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_folders_that_hold_no_checkpoint(copy, tmp_path):
    refused(tmp_path / "nowhere", "no such folder", error=ConfigError)
    build().save_pretrained(tmp_path / "dense")
    refused(tmp_path / "dense", "not a gptvq checkpoint", error=ConfigError)
    (copy / "config.json").unlink()
    refused(copy, "never finished")


def test_shards(packed, tmp_path, monkeypatch, ids):
    """Split over several files the model is the same; the index may not point elsewhere."""
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 60_000)
    folder = tmp_path / "sharded"
    report = gptvq.quantize(build("llama-bias"), folder, preset(), calibration=ids)
    files = sorted(f.name for f in folder.glob("*.safetensors"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(files) > 2 and sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == report.packed_bytes + report.other_bytes
    assert torch.equal(logits(gptvq.load(folder, device="cpu"), ids), logits(report.model, ids))
    shutil.move(folder / files[1], tmp_path / "elsewhere.safetensors")
    refused(folder, folder / files[1])
    index["weight_map"] = {name: file.replace(files[1], "../elsewhere.safetensors") for name, file in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "'../elsewhere.safetensors'", "plain name")


def test_indices_lie_on_cache_lines(packed):
    """As loaded, from the mapped file: a load of 64 bytes would touch two lines otherwise."""
    buffers = {name: tensor for name, tensor in gptvq.load(packed, device="cpu").named_buffers() if name.endswith(".idx")}
    assert len(buffers) == 14 and {tensor.data_ptr() % 64 for tensor in buffers.values()} == {0}


def test_dtype_and_device_are_checked(packed):
    for arguments in (dict(dtype="int8"), dict(device="toaster")):
        with pytest.raises(ConfigError, match=next(iter(arguments))):
            gptvq.load(packed, **{"device": "cpu", **arguments})


def test_the_report_is_beside_it(packed):
    report = gptvq.Report.load(packed)
    settings = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert report.bits_per_value == settings["bits_per_value"]
    assert {r.name: r.spec.to_dict() for r in report.layers} == settings["layers"]
    assert gptvq.VQConfig.from_dict(settings["config"]) == report.config
