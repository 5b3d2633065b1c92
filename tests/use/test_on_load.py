"""from_pretrained with a GptvqConfig quantizes; device maps and wrong uses of both end in errors that name the culprit."""
import shutil
import sys
import tempfile

import pytest
import torch
from job.tiny_models import build, logits, preset
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

import gptvq
from gptvq import ConfigError, FormatError, GptvqConfig, VQLinear, cli

IDS = torch.arange(64).view(2, 32) * 7 % 256


def settings(**changes):
    return GptvqConfig(**{"config": preset("2d-2.25"), "calibration": IDS, **changes})


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "model"
    build("llama-bias").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def packed(dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "out"
    gptvq.quantize(dense, folder, preset("2d-2.25"), calibration=IDS)
    return folder


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """Where temporary folders go."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


def same_state(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("name, head", [("llama-tied", ""), ("gpt2", ""), ("mixtral", ""), ("llama-tied", "2d-4.125"), ("llama", "1d-4.125")])
def test_the_same_bytes_as_quantize_and_load(name, head, tmp_path, scratch):
    build(name).save_pretrained(tmp_path / "dense")
    gptvq.quantize(tmp_path / "dense", tmp_path / "out", preset("2d-2.25", head=head), calibration=IDS)
    wish = settings(config=preset("2d-2.25", head=head))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=wish)
    want = gptvq.load(tmp_path / "out", "cpu")
    same_state(model, want)
    assert not model.training and sum(isinstance(module, VQLinear) for module in model.modules()) == len(wish.report.layers)
    assert wish.report.bits_per_value == model.config.quantization_config.bits_per_value
    assert not list(scratch.glob("gptvq-*")), "the temporary folder is still there"
    assert torch.equal(logits(model, IDS), logits(want, IDS))
    model.save_pretrained(tmp_path / "again")
    same_state(gptvq.load(tmp_path / "again", "cpu"), want)
    assert (tmp_path / "again/model.safetensors").stat().st_size < 1.2 * (tmp_path / "out/model.safetensors").stat().st_size


def test_text_and_a_folder_to_keep(my_model, tmp_path, monkeypatch):
    text = my_model.parent / "calibration.txt"
    wish = GptvqConfig("2d-2.25", calibration=str(text), samples=2, sequence_length=64, out=tmp_path / "kept")
    model = AutoModelForCausalLM.from_pretrained(my_model, quantization_config=wish, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and gptvq.Report.load(tmp_path / "kept").calibration["source"] == text.name
    gptvq.quantize(my_model, tmp_path / "out", "2d-2.25", calibration=text, samples=2, sequence_length=64, dtype="bfloat16")
    assert (tmp_path / "kept/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()
    monkeypatch.setattr(sys.modules["gptvq.quantize"], "solve", None)           # a second load finds it done
    again = AutoModelForCausalLM.from_pretrained(my_model, quantization_config=wish, dtype=torch.bfloat16)
    same_state(model, again)


def test_the_dense_model_is_never_in_memory(dense, scratch, monkeypatch):
    """Weights come from the packed files: a dense linear of the model that is returned would have to be read first."""
    from gptvq import on_load, stream

    streams, opened = [], stream.open_stream
    monkeypatch.setattr(sys.modules["gptvq.quantize"], "open_stream",
                        lambda *args, **named: streams.append(opened(*args, **named)) or streams[-1])
    seen, quantize = [], on_load.Dense.quantize
    monkeypatch.setattr(on_load.Dense, "quantize", lambda self: seen.append({t.device.type for t in self.model.state_dict().values()})
                        or quantize(self))
    AutoModelForCausalLM.from_pretrained(dense, quantization_config=settings())
    assert seen == [{"meta"}] and streams[0].streamed


@pytest.mark.parametrize("arguments, says", [
    ({}, "calibration: got None.*calibration.txt"), ({"calibration": "x y", "config": 3}, "config: got int"),
    ({"calibration": "x y", "config": "2d-9"}, "unknown preset '2d-9'")])
def test_wishes_that_cannot_be(arguments, says):
    with pytest.raises(ConfigError, match=says):
        GptvqConfig(**arguments)


def test_sources_that_cannot_be_quantized(dense, packed, tmp_path, scratch):
    load = AutoModelForCausalLM.from_pretrained
    with pytest.raises(ConfigError, match="no such file: missing.txt"):
        load(dense, quantization_config=settings(calibration="missing.txt", tokenizer=lambda text: None))
    with pytest.raises(ConfigError, match="no tokenizer"):
        load(dense, quantization_config=settings(calibration="some text"))
    assert not list(scratch.glob("gptvq-*"))
    with pytest.raises(ValueError, match="quantized with PackedGptvqConfig but you are passing a GptvqConfig"):
        load(packed, quantization_config=settings())
    with pytest.raises(ConfigError, match="a dense checkpoint; .* need gptvq.GptvqConfig"):
        load(dense, quantization_config=load(packed).config.quantization_config)
    for kind in (AutoModelForSequenceClassification, AutoModel):
        with pytest.raises(ConfigError, match="only causal language models can; use AutoModelForCausalLM"):
            kind.from_pretrained(dense, quantization_config=settings())
    with pytest.raises(ConfigError, match="without state_dict="):
        model = build()
        type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict(), quantization_config=settings())


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}, torch.device("cpu")], ids=str)
def test_device_maps(packed, dense, device_map):
    if device_map == "auto" and torch.cuda.is_available():
        pytest.skip("compares with the CPU")
    want = gptvq.load(packed, "cpu")
    same_state(AutoModelForCausalLM.from_pretrained(packed, device_map=device_map), want)
    if not isinstance(device_map, dict):
        same_state(AutoModelForCausalLM.from_pretrained(dense, device_map=device_map, quantization_config=settings()), want)


def test_device_map_of_shards(packed, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(packed)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    same_state(AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu"), model)
    next(tmp_path.glob("*2-of*.safetensors")).unlink()
    with pytest.raises((FormatError, OSError), match="2-of"):
        AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")


@pytest.mark.parametrize("device_map, says", [
    ({"": "cpu", "model.layers.9": "cpu"}, "LlamaForCausalLM has no module 'model.layers.9'"),
    ({"": "cpu", "model.layers.1": "disk"}, "'model.layers.1' goes to 'disk', but packed layers cannot be offloaded"),
    ({"": "meta"}, "'the model' goes to 'meta', but packed layers cannot be offloaded"),
    ({"": 0, "model.layers.1.mlp": "cpu"}, "'model.layers.1.mlp' goes to 'cpu', but packed layers cannot be offloaded")])
def test_device_maps_that_cannot_be(packed, dense, scratch, device_map, says):
    with pytest.raises(ConfigError, match=says):
        AutoModelForCausalLM.from_pretrained(packed, device_map=device_map)
    with pytest.raises(ConfigError, match=says):
        AutoModelForCausalLM.from_pretrained(dense, device_map=device_map, quantization_config=settings())
    assert not list(scratch.glob("gptvq-*"))


def test_memory_that_is_too_small_for_the_map(packed, tmp_path):
    with pytest.raises(ConfigError, match="goes to 'disk', .*raise max_memory"):
        AutoModelForCausalLM.from_pretrained(packed, device_map="auto", max_memory={"cpu": 30_000}, offload_folder=tmp_path)


def test_saved_again_where_something_was(dense, packed, tmp_path, capsys):
    """transformers leaves the index of the files it replaces."""
    model = AutoModelForCausalLM.from_pretrained(packed)
    for limit in ("60KB", "5GB"):
        model.save_pretrained(tmp_path / "twice", max_shard_size=limit)
        assert gptvq.verify(tmp_path / "twice").layers == 14
    shutil.copytree(packed, tmp_path / "same")
    model.save_pretrained(tmp_path / "same")
    for folder in (tmp_path / "twice", tmp_path / "same"):
        assert "files" not in gptvq.verify(folder).hashed and (folder / "model.safetensors.index.json").exists()
        same_state(gptvq.load(folder, "cpu"), model)
    assert cli.main(["inspect", str(tmp_path / "twice")]) == 1 and "save_pretrained writes none" in capsys.readouterr().err
    with torch.no_grad():
        next(m for m in model.modules() if isinstance(m, VQLinear)).gs.mul_(2)
    model.save_pretrained(tmp_path / "same")                # report.json is of what was there before
    assert gptvq.verify(tmp_path / "same").hashed == ()
    assert cli.main(["inspect", str(tmp_path / "same")]) == 1 and "save_pretrained writes none" in capsys.readouterr().err
    for again, error in (({}, "not empty"), ({"redo": "layers.1.*"}, "not as quantizing left it")):
        with pytest.raises(ConfigError, match=error):
            gptvq.quantize(dense, tmp_path / "same", preset("2d-2.25"), calibration=IDS, **again)
    model.save_pretrained(tmp_path / "same", max_shard_size="60KB")
    with pytest.raises(FormatError, match=r"reads model\.safetensors, .* names other files"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "same")


@pytest.mark.parametrize("limit", ["60KB", "5GB"])
def test_variants(packed, tmp_path, limit):
    model = AutoModelForCausalLM.from_pretrained(packed)
    model.save_pretrained(tmp_path, variant="fp", max_shard_size=limit)
    same_state(AutoModelForCausalLM.from_pretrained(tmp_path, variant="fp"), model)


def test_hashes_hold_for_what_quantize_wrote(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "out")
    file = tmp_path / "out/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(FormatError, match="sha256"):
        gptvq.verify(tmp_path / "out")


@pytest.mark.parametrize("name, head", [("llama", ""), ("llama", "2d-4.125"), ("gpt2", ""), ("mixtral", "")])
def test_without_the_head_or_with_another(name, head, tmp_path):
    gptvq.quantize(build(name), tmp_path / "out", preset("2d-2.25", head=head), calibration=IDS)
    want = AutoModelForCausalLM.from_pretrained(tmp_path / "out").base_model(IDS).last_hidden_state
    for kind in (AutoModel, AutoModelForSequenceClassification):
        for source in (tmp_path / "out", tmp_path / kind.__name__):         # the latter as it was saved
            model = kind.from_pretrained(source, pad_token_id=0).eval()
            assert torch.equal(model.base_model(IDS).last_hidden_state, want)
            model.save_pretrained(tmp_path / kind.__name__)
        assert gptvq.verify(tmp_path / kind.__name__).layers == len(model.config.quantization_config.layers)


def test_what_a_model_without_the_head_needs(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "out")
    config, index = tmp_path / "out/config.json", tmp_path / "out/model.safetensors.index.json"
    tensors = load_file(tmp_path / "out/model.safetensors")
    save_file({name: t for name, t in tensors.items() if name != "model.layers.1.mlp.up_proj.gs"}, tmp_path / "out/model.safetensors")
    index.unlink()
    with pytest.raises(FormatError, match="'model.layers.1.mlp.up_proj.gs' is missing|'layers.1.mlp.up_proj.gs' is missing"):
        AutoModel.from_pretrained(tmp_path / "out")
    config.write_text(config.read_text().replace("model.layers.1.mlp.up_proj", "model.layers.9.mlp.up_proj"))
    with pytest.raises(FormatError, match="'layers.9.mlp.up_proj': got a spec"):
        AutoModel.from_pretrained(tmp_path / "out")
