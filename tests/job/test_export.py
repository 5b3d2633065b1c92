"""A dense export computes what the packed model computes, and transformers loads it without gptvq."""
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

import gptvq
from gptvq.errors import ConfigError, FormatError, GptvqError
from gptvq.export import export_dense
from gptvq.linear import set_activations
from job.tiny_models import build, preset

PROBE = """
import json, sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
assert "gptvq" not in sys.modules
ids = torch.arange(24)[None] % 250
with torch.no_grad():
    torch.save(model(ids).logits, sys.argv[2])
tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
print(json.dumps({"classes": sorted({type(m).__name__ for m in model.modules()}), "tied": tied}))
"""


@pytest.fixture(scope="module", params=["llama-tied", "llama-bias", "gpt2", "mixtral"])
def packed(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / request.param
    rules = (("*.experts.1.up_proj", None),) if request.param == "mixtral" else ()
    gptvq.quantize(build(request.param), folder, preset("2d-3.125", rules=rules), calibration=torch.arange(256).view(8, 32) % 250)
    return folder


def test_export_is_the_packed_model_without_gptvq(packed, tmp_path):
    out = export_dense(packed, tmp_path / "dense", dtype="float32", shard_bytes=40_000)
    assert len(list(out.glob("*.safetensors"))) > 1 and "quantization_config" not in json.loads((out / "config.json").read_text())
    run = subprocess.run([sys.executable, "-c", PROBE, str(out), str(tmp_path / "logits")], capture_output=True, text=True, check=True,
                         env={"PATH": "", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}, cwd=tmp_path)
    found = json.loads(run.stdout)
    model = gptvq.load(packed)
    assert "VQLinear" not in found["classes"] and found["tied"] == bool(model.config.tie_word_embeddings)
    set_activations(model, "fp32")
    with torch.no_grad():
        want = model(torch.arange(24)[None] % 250).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits"), want, rtol=1e-4, atol=1e-4)


def test_halves_and_a_single_file(packed, tmp_path):
    out = export_dense(packed, tmp_path / "half", dtype="bfloat16")
    assert [p.name for p in out.glob("*.safetensors")] == ["model.safetensors"] and not (out / "model.safetensors.index.json").exists()
    model, _ = gptvq.hf.open_model(out, "cpu")
    layer = next(name for name in json.loads((packed / "config.json").read_text())["quantization_config"]["layers"] if "experts" not in name)
    dense, vq = model.get_submodule(layer), gptvq.load(packed).get_submodule(layer)
    weight = dense.weight.T if type(dense).__name__ == "Conv1D" else dense.weight
    assert weight.dtype == torch.bfloat16 and torch.equal(weight, vq.dequantize(torch.bfloat16))


def cut(folder):
    config = json.loads((folder / "config.json").read_text())
    config.update({name: 1 for name in ("num_hidden_layers", "n_layer") if name in config})
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("change, error, says", [
    (lambda folder: (folder / "config.json").unlink(), ConfigError, "not a gptvq checkpoint"),
    (lambda folder: (folder / "model.safetensors").unlink(), FormatError, "model.safetensors"),
    (lambda folder: os.truncate(folder / "model.safetensors", 5000), FormatError, "model.safetensors"),
    (cut, FormatError, r"config\.json: the model that it describes has no '.*\.1\."),
])
def test_damage_is_named_and_nothing_is_left(packed, tmp_path, change, error, says):
    copy = tmp_path / "copy"
    shutil.copytree(packed, copy)
    change(copy)
    with pytest.raises(error, match=says):
        export_dense(copy, tmp_path / "out")
    assert not list(tmp_path.glob("out/*.safetensors")) and not (tmp_path / "out" / "config.json").exists()


def test_refusals(packed, tmp_path):
    with pytest.raises(ConfigError, match="own folder"):
        export_dense(packed, packed, overwrite=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(ConfigError, match="not empty"):
        export_dense(packed, tmp_path / "full")
    with pytest.raises(GptvqError, match="dtype"):
        export_dense(packed, tmp_path / "out", dtype="int8")
